"""Compare methods with the plain model on COCO-format data of your own: POPE and CHAIR.

    python examples/compare_methods.py coco/ runs/mine
    python examples/compare_methods.py coco/ runs/mine llava-hf/llava-1.5-7b-hf

The first argument holds annotations/instances*.json, perhaps captions*.json, and the images in a
folder or zip file. From a shell: vlmfix eval pope,chair --data coco/ --method vhr,pai,vhr+pai
"""

import sys

import rich

import vlmfix.evals


def main(data: str, output: str, name: str = "emoji") -> None:
    """Evaluate, print the tables, and the differences that are more than noise."""
    results = vlmfix.evals.evaluate(
        ["pope", "chair"],
        model=name,
        methods=["vhr", "pai", ["vhr", "pai"]],  # three arms; the last is a stack of two
        data=data,
        n_images=None,  # all images that a task can ask about; 500 is what papers take
        output=output,
        resume=True,  # a run that was ended goes on
    )
    rich.print(vlmfix.evals.render(results))
    for task, group, metric in (("pope", "pooled", "accuracy"), ("chair", "caption", "chair_i")):
        for arm, scored in results["tasks"][task]["arms"].items():
            if arm == "base":
                continue
            difference = scored["delta"][group][metric]
            low, high = (100 * bound for bound in difference["ci"])
            verdict = "within noise" if low <= 0 <= high else "beyond noise"
            print(f"{task} {metric}, {arm}: {100 * difference['value']:+.1f} "
                  f"[{low:+.1f}, {high:+.1f}], {verdict}")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
