"""Fine-tunes in the form of PEFT's method_comparison results, for its own tables and pages.

One file a seed, with the keys that huggingface/peft's `method_comparison/processing.py` reads. What
a fine-tune here does not measure stands for the nearest that it does: `FORM` says what.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TYPES = {"lora": "LORA", "hira": "HIRA"}  # the others are HUT's
LAST = 10  # steps whose mean is the training loss
FORM = (
    "accelerator_memory_*: the most that a step takes above what is resident; train_time: forward "
    "and backward on one batch, times the steps; train total tokens: with padding"
)


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes a file for each seed of each adapter.

    Raises:
        ValueError: A row that is no whole fine-tune scored by accuracy.
    """
    files = []
    for row in rows:
        if row.get("suite") != "finetune" or not row["complete"] or row["metric"] != "accuracy":
            raise ValueError(
                "PEFT's form holds complete fine-tunes scored by accuracy (make finetune); got a "
                f"row of suite {row.get('suite')!r}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name, result in _results(row):
            files.append(folder / f"{name.replace('/', '--')}.json")
            files[-1].write_text(json.dumps(result, indent=2) + "\n")
    return files


def _results(record: Row) -> Iterator[tuple[str, Row]]:
    for method in record["methods"]:
        if method["r"] is None:  # the head on its own: no adapter
            continue
        for run in method["runs"]:
            name = f"{method['method']}/rank{method['r']}-lr{method['rate']:g}-seed{run['seed']}"
            yield name, _result(record, method, run, name)


def _result(record: Row, method: Row, run: Row, name: str) -> Row:
    recipe, environment, steps = record["recipe"], record["environment"], record["steps"]
    versions, samples = environment["versions"], steps * recipe["batch"]
    train_config = {
        "model_id": recipe["model"],
        "dtype": "float32" if environment["device"] == "cpu" else "bfloat16",
        "max_seq_length": recipe["max_length"],
        "batch_size": recipe["batch"],
        "max_steps": steps,
        "seed": run["seed"],
        "grad_norm_clip": 1.0,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": method["rate"], "weight_decay": recipe["weight_decay"]},
        "lr_scheduler": "linear",
    }
    peft_type = TYPES.get(method["method"], "HUT")
    memory = {
        f"accelerator_memory_{kind}": method["peak_bytes"]
        for kind in ("reserved_avg", "max", "reserved_99th")
    }
    last = {
        "step": steps,
        "test accuracy": run["test"]["accuracy"],
        "train loss": statistics.fmean(run["losses"][-LAST:]),
        "train samples": samples,
        "train total tokens": samples * recipe["max_length"],
    }
    return {
        "run_info": {
            "created_at": environment["date"],
            "total_time": record["seconds"],
            "experiment_name": name,
            "peft_branch": "main",
            "train_config": train_config,
            "peft_config": {
                "peft_type": peft_type,
                "r": method["r"],
                "target_modules": recipe["target"],
            },
            "error_msg": "",
        },
        "train_info": {
            **memory,
            "train_time": steps * method["step"]["median"],
            "file_size": method["adapter_bytes"],
            "num_trainable_params": method["trainable"] + method["head"],
            "status": "success",
            "metrics": [last],
        },
        "meta_info": {
            "dataset_info": {recipe["dataset"]: record["data"]},
            "package_info": {
                f"{package}-version": versions.get(package)
                for package in ("peft", "transformers", "datasets", "torch", "bitsandbytes")
            }
            | {"hut_kernels-version": versions["hut_kernels"]},
            "system_info": {
                "system": environment["platform"],
                "accelerator": environment["device_name"],
            },
            "form": FORM,
        },
    }
