"""The section [highway]: how the gradient of the loss reaches the blocks."""

from dataclasses import dataclass

from titan_attent.foundations.checks import check_number, check_one_of

CUTS = ("branch", "block", "stage")

FORMER_NAME = "backward"
"""The name of the section in earlier versions."""


@dataclass
class HighwayConfig:
    """How the gradient of the loss reaches the blocks."""

    method: str = "exact"
    """
    - "exact": torch's own backpropagation.
    - "highway": Highway backpropagation (Fagnou et al. 2025). The gradient at the last block's output goes to all
      blocks at once along the residual stream. Then ``iterations`` rounds correct it by the blocks' own gradients.
    """

    iterations: int = 0
    """
    Number of correction rounds k. With 0 every block gets the gradient at the last block's output unchanged; only this
    value saves compute. With the number of blocks, or -1, the gradients are exact.
    """

    cut: str = "branch"
    """
    Where the gradient's path is cut.
    - "branch": before attention and before feed-forward. With ``iterations = 0`` and dense llama3 or qwen3 only.
    - "stage": between pipeline stages, whose backwards then run at the same time. Each stage is exact within itself.
      With ``pipeline_parallel_degree`` P above 1 only; P - 2 rounds, or -1, are exact.
    - "block": before each block, which is exact within itself. With ``iterations = 0`` it saves no matrix product, as
      the weights of a block's first norm need nearly all of the block's own backward.
    """

    tolerance: float = 0.0
    """
    Bound on the last correction, as a share of the gradient and in the mean over the blocks. If above 0, step 1 and
    every 16th step set the smallest number of rounds that meets it, between 1 and ``iterations``. With 0 the number of
    rounds is always ``iterations``.
    """

    fit_gain: bool = False
    """
    Give each block's residual path a gain c, fitted to the block's effect on gradients, instead of 1. It is a moving
    average of <w, wJ> / <w, w>, updated in step 1 and every 16th step. Needs ``iterations`` of 1 or more.
    """

    exact_fraction: float = 0.25
    """Fraction of ``training.steps``, at the end of the run, trained by exact backpropagation, in [0, 1]."""

    log_cosine: bool = False
    """
    Log the cosine between the highway gradient and the exact one at every block's output (``highway/cosine``). It is
    measured in the step before each logged step, and costs one exact backward of the blocks in that step.
    """

    def validate(self) -> None:
        """Raise a ValueError that names the key, its value and the fix if any value is out of range."""
        check_one_of("method", self.method, ("exact", "highway"), section="highway")
        check_one_of("cut", self.cut, CUTS, section="highway")
        check_number("iterations", self.iterations, at_least=-1, whole=True, section="highway")
        check_number("tolerance", self.tolerance, at_least=0, below=1, section="highway")
        check_number("exact_fraction", self.exact_fraction, at_least=0, at_most=1, section="highway")
        for key in ("fit_gain", "tolerance"):
            if self.iterations == 0 and (value := getattr(self, key)):
                shown = "true" if value is True else value
                raise ValueError(
                    f"[highway] {key} = {shown} with iterations = 0: it is measured on the input gradients of blocks, "
                    f"which are not computed without rounds. Set iterations = 1 or more, or remove {key}"
                )
        measured = {key: getattr(self, key) for key in ("fit_gain", "tolerance", "log_cosine")}
        if self.cut == "stage" and any(measured.values()):
            key = next(key for key, value in measured.items() if value)
            raise ValueError(
                f'[highway] {key} with cut = "stage": stages do not compare rounds. Remove {key}, or set cut = "block"'
            )
        if self.cut == "branch" and (self.iterations != 0 or self.log_cosine):
            key, value = ("iterations", self.iterations) if self.iterations else ("log_cosine", "true")
            raise ValueError(
                f'[highway] {key} = {value} with cut = "branch", which computes no input gradients of blocks. Set cut '
                f'= "block", or remove {key}'
            )
