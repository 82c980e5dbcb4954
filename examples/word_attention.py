"""Draw what the model looked at when it wrote a word, plain and under a method.

    python examples/word_attention.py umbrella out.png
    python examples/word_attention.py dog out.png llava-hf/llava-1.5-7b-hf photo.jpg

Needs the extra `eval` (matplotlib). Both maps read the plain model's answer, so that what differs
is the method's doing and not another text. docs/maps.md says how to read them, and how not to.
"""

import sys

import vlmfix
from vlmfix.analysis.viz import draw_maps
from vlmfix.chat import chat_inputs


def main(word: str, output: str, name: str = "emoji", image: str = "emoji:4") -> None:
    """Answer, find the word in the answer, draw the map of the row that predicted it."""
    model, processor = vlmfix.load(name)
    picture = vlmfix.load_image(image)
    question = {"type": "text", "text": "Describe the image."}
    content = [{"type": "image", "image": picture}, question]
    inputs = chat_inputs(model, processor, [[{"role": "user", "content": content}]])
    generated = model.generate(**inputs, max_new_tokens=100, do_sample=False)
    written = generated[0, inputs["input_ids"].shape[1] :]
    answer = processor.decode(written, skip_special_tokens=True)
    print(answer)

    # The row that predicted the word's first token is the one after which the word begins.
    start = answer.find(word)
    if start < 0:
        raise SystemExit(f"the answer has no word {word!r}")
    ends = [len(processor.decode(written[: n + 1], skip_special_tokens=True))
            for n in range(len(written))]  # fmt: skip
    token = next(n for n, end in enumerate(ends) if end > start)

    grids = {}
    for method in (None, "pai"):
        with vlmfix.wrapped(model, method):
            ((seen,),) = vlmfix.attention_map(model, inputs, rows="answer", generated=generated)
        grids[method or "plain"] = seen.grids()[0].mean((0, 1))[token]  # over layers and heads
    draw_maps(picture, grids, output)
    for label, grid in grids.items():
        row, column = divmod(int(grid.argmax()), grid.shape[1])
        print(f"{label}: {float(grid.sum()):.3f} on the image, most at row {row}, column {column}")


if __name__ == "__main__":
    main(*sys.argv[1:])
