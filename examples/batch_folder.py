"""Describe every image of a folder, in batches, under a method; one JSON line per image.

    python examples/batch_folder.py IMAGES answers.jsonl
    python examples/batch_folder.py IMAGES answers.jsonl --model llava-hf/llava-1.5-7b-hf

A second run goes on where the first one stopped.
"""

import argparse
import json
from pathlib import Path

import vlmfix

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main() -> None:
    """Read the arguments, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder of images, searched with its subfolders")
    parser.add_argument("output", type=Path, help="file of JSON lines, appended to")
    parser.add_argument("--model", default="emoji", help="emoji, a folder or a hub id")
    parser.add_argument("--method", default="vhr", help='such as "pai:alpha=0.5" or "imba+vhr"')
    parser.add_argument("--prompt", default="Describe the image.")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()

    files = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in SUFFIXES)
    done = set()
    if options.output.exists():
        done = {json.loads(line)["image"] for line in options.output.read_text().splitlines()}
    names = [name for name in (str(path.relative_to(options.images)) for path in files)
             if name not in done]  # fmt: skip

    model, processor = vlmfix.load(options.model)
    vlmfix.wrap(model, options.method)
    question = {"type": "text", "text": options.prompt}
    with options.output.open("a", encoding="utf-8") as output:
        for start in range(0, len(names), options.batch_size):
            batch = names[start : start + options.batch_size]
            chats = []
            for name in batch:
                image = {"type": "image", "image": options.images / name}
                chats.append([{"role": "user", "content": [image, question]}])
            texts = vlmfix.generate(model, processor, chats, max_new_tokens=100, do_sample=False)
            for name, text in zip(batch, texts, strict=True):
                row = {"image": name, "answer": text, "method": options.method}
                output.write(json.dumps(row, ensure_ascii=False) + "\n")
            output.flush()
    print(f"{len(names)} images described, {len(done)} were there already: {options.output}")


if __name__ == "__main__":
    main()
