"""Ask a model about an image, plain and under a method, and see what the method did.

    python examples/quickstart.py                                        # the bundled model, a CPU
    python examples/quickstart.py llava-hf/llava-1.5-7b-hf photo.jpg     # a GPU with 16 GB

Both arguments may be left out: MODEL is "emoji", a folder or a hub id, IMAGE a file or "emoji:4".
"""

import sys

import vlmfix


def main(name: str = "emoji", image: str = "emoji:4") -> None:
    """Print both answers."""
    model, processor = vlmfix.load(name)
    question = {"type": "text", "text": "Describe the image."}
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, question]}]

    def answer() -> str:
        return str(vlmfix.generate(model, processor, chat, max_new_tokens=100, do_sample=False))

    print("plain:", answer())
    with vlmfix.wrapped(model, "vhr"):  # or wrap() and unwrap(), if a block does not fit
        print("vhr:  ", answer())
        print(vlmfix.last_call(model))
    print("plain:", answer())  # the model is, bit for bit, what it was


if __name__ == "__main__":
    main(*sys.argv[1:])
