"""The rules of the single-pass experiment, and the commands of its runs.

A run is one (corpus, rule, seed). Scorers are made once for (trusted text, corpus, seed) by the product's own command.
"""

from typing import Any

from benchmarks.common.rules import AMATEUR, PAIR, UNIFORM, Rule
from benchmarks.common.tasks import LEARNING_RATE, Task, divisor, run_config
from benchmarks.single_pass.corpora import CORPORA

STEPS = 400
"""Steps of a full run: 12,800 of 32,000 rows, none twice. Every run decays its learning rate to zero at its end."""
SCORERS = ("--flavor", "bigram")
"""The arguments of the scorers' command that choose their model."""
SCORED_BY = f"scorers: {' '.join(SCORERS)}"
"""Stored in the configuration of runs that read the losses: with other scorers it is another run."""

ON_DISK: dict[str, Any] = {
    "strategy": "hard",
    "interval_schedule": "fixed",
    "full_data_tail": 0.0,
}
DIFFERENCE = ON_DISK | {
    "importance": "cross_entropy_difference",
    "scores": PAIR,
    "ratio_schedule": "calibrated",
}
ATTAINMENT = ON_DISK | {
    "importance": "attainment",
    "scores": AMATEUR,
    "scoring": "amateur",
    "ratio_schedule": "adaptive",
    "initial_ratio": 0.1,
    "final_ratio": 1.0,
}

RULES = {
    "uniform": Rule(about="everything, in random order: [teacher] left empty", teacher=UNIFORM),
    "difference": Rule(about="amateur - expert above what trusted text shows", teacher=DIFFERENCE),
    "difference_87": Rule(
        about="the same in 0.875 of the steps", teacher=DIFFERENCE, share=0.875, only_on=("near_duplicates", "web")
    ),
    "difference_67": Rule(
        about="the same in 0.675 of the steps",
        teacher=DIFFERENCE,
        share=0.675,
        only_on=("junk", "near_duplicates", "target", "web"),
    ),
    "difference_55": Rule(
        about="the same in 0.55 of the steps",
        teacher=DIFFERENCE,
        share=0.55,
        only_on=("junk", "near_duplicates", "target"),
    ),
    "top_67": Rule(
        about="the 27% of largest difference, in 0.675 of the steps",
        teacher=DIFFERENCE | {"ratio_schedule": "constant", "initial_ratio": 0.27},
        share=0.675,
        only_on=("near_duplicates",),
    ),
    "dedup_67": Rule(
        about="difference, of rows that share no 50 tokens with another, in 0.675 of the steps",
        teacher=DIFFERENCE,
        share=0.675,
        data="dedup",
        only_on=("near_duplicates",),
    ),
    "attainment": Rule(about="attainment of the amateur, its own ratio; no trusted text", teacher=ATTAINMENT),
    "dedup": Rule(about="uniform, rows that share 50 tokens with another left out", teacher=UNIFORM, data="dedup"),
    "perplexity": Rule(about="uniform on the middle half by the amateur's loss", teacher=UNIFORM, data="middle"),
}


def scored_data(corpus: str, rule: Rule) -> str:
    """Folder below ``corpora/`` of what the scorers of a rule score."""
    return f"{corpus}-dedup" if rule.data == "dedup" else corpus


def scores_folder(data: str, seed: int) -> str:
    return f"scorers/{data}/seed-{seed}"


def data_of(corpus: str, rule: Rule, seed: int) -> str:
    """The folder below ``corpora/`` that a rule trains on."""
    if rule.data == "middle":
        return f"{corpus}-middle-{seed}"
    return f"{corpus}-{rule.data}" if rule.data else corpus


def config(folder: str, corpus: str, *, data: str, teacher: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    made = run_config(folder, data=data, teacher=teacher, seed=seed, steps=steps, lr=LEARNING_RATE)
    made["data"]["validation_path"] = f"corpora/validation-{CORPORA[corpus].name}"
    made["validation"]["freq"] = divisor(steps, at_most=80)
    if len(CORPORA[corpus].target) > 1:  # the final weights are evaluated on each kind
        made["checkpoint"] = {"enable": True, "interval": steps, "last_save_model_only": True}
    return made


def rule_task(corpus: str, name: str, seed: int) -> Task:
    rule, folder = RULES[name], f"runs/{corpus}/{name}/seed-{seed}"
    scores = scores_folder(scored_data(corpus, rule), seed)
    made = config(
        folder,
        corpus,
        data=data_of(corpus, rule, seed),
        teacher=rule.teacher_with({AMATEUR: f"{scores}/amateur", PAIR: scores}),
        seed=seed,
        steps=max(1, round(rule.share * STEPS / 10) * 10),
    )
    if rule.scorers:
        made["job"]["description"] = SCORED_BY
    return Task(
        folder=folder,
        module="titan_attent.train",
        config=made,
        labels={"corpus": corpus, "rule": name, "seed": seed},
    )


def scorers_task(corpus: str, seed: int, *, data: str) -> Task:
    """Makes the amateur and the expert for ``data``, a folder of ``corpus``, and their losses on it."""
    folder, name = scores_folder(data, seed), CORPORA[corpus].name
    made = config(folder, corpus, data=data, teacher=UNIFORM, seed=seed, steps=STEPS)
    made["job"]["description"] = SCORED_BY
    return Task(
        folder=f"{folder}/command",
        module="titan_attent.score",
        config=made,
        arguments=("pair", "--trusted", f"corpora/trusted-{name}", "--output", folder, *SCORERS),
        labels={"corpus": corpus, "rule": "scorers", "seed": seed},
    )


def kinds_task(corpus: str, name: str, seed: int) -> Task:
    """Computes the final weights' loss on each validation row, for a corpus with several target kinds."""
    run = rule_task(corpus, name, seed)
    folder = f"{run.folder}/validation"
    validation = f"validation-{CORPORA[corpus].name}"
    made = config(folder, corpus, data=validation, teacher=UNIFORM, seed=seed, steps=run.steps)
    made["checkpoint"] = {
        "enable": True,
        "initial_load_path": f"{run.folder}/checkpoint/step-{run.steps}",
        "initial_load_model_only": True,
    }
    labels = {"corpus": corpus, "rule": name, "seed": seed}
    arguments = ("checkpoint", "--output", f"{folder}/losses")
    return Task(folder=folder, module="titan_attent.score", arguments=arguments, config=made, labels=labels)
