"""The command that computes scores: ``torchrun ... -m titan_attent.score {pair,checkpoint,targets}
--output DIR --job.config_file X.toml [--section.key value ...]`` writes a model's losses on every example of ``[data]
path``.

``pair`` first trains two small models (titan/scoring/pair.py); ``checkpoint`` uses the weights of a checkpoint
(titan/scoring/checkpoint.py). ``targets`` writes target ids per token of a source, for distillation
(titan/scoring/targets.py).
"""

from titan_attent.titan.scoring.command import score

if __name__ == "__main__":
    score()
