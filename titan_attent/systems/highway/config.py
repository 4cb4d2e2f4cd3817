"""The section [highway]: which way the gradient takes."""

from dataclasses import dataclass

from titan_attent.foundations.checks import check_number, check_one_of

CUTS = ("branch", "block", "stage")


@dataclass
class HighwayConfig:
    """How the gradient of the loss reaches the blocks."""

    method: str = "exact"
    """
    - "exact": backpropagation, torch's own.
    - "highway": Highway backpropagation (Fagnou et al. 2025): the gradient at the last block's output goes to all
      blocks at once along the residual stream, and ``iterations`` rounds correct it by what the blocks do to it.
    """

    iterations: int = 0
    """
    Rounds k of the correction. 0: all get the gradient of the last block's output as it is; the one value that saves
    compute. From the number of blocks on, or -1, the gradients are exact.
    """

    cut: str = "branch"
    """
    Where the gradient's path is cut.
    - "branch": before attention and before feed-forward, with ``iterations = 0`` only; dense llama3 and qwen3.
    - "stage": between pipeline stages, each exact within itself, whose backwards then run at the same time. With
      ``pipeline_parallel_degree`` P above 1 only; P - 2 rounds, or -1, are exact.
    - "block": before each block, which is exact within itself. With ``iterations = 0`` it saves no matrix product, as
      the weights of a block's first norm need nearly all of the block's own backward.
    """

    tolerance: float = 0.0
    """
    Above 0: as few rounds as leave a last correction smaller than this share of the gradient, in the mean of the
    blocks, from 1 up to ``iterations``; looked at in step 1 and every 16 steps. 0 for always ``iterations``.
    """

    fit_gain: bool = False
    """
    Give each block's residual path a gain c instead of 1, fitted to what the block does to gradients: the mean of
    <w, wJ> / <w, w>, looked at in step 1 and every 16 steps. Needs ``iterations`` of 1 or more.
    """

    exact_fraction: float = 0.25
    """The last part of ``training.steps``, trained by exact backpropagation, in [0, 1]."""

    log_cosine: bool = False
    """
    Log the cosine between the highway's gradient and the exact one at every block's output (``highway/cosine``),
    measured in the step before each logged one. Costs one exact backward of the blocks in such a step.
    """

    def validate(self) -> None:
        """Raise a ValueError that names the key, its value and the mend if any value is out of its range."""
        check_one_of("method", self.method, ("exact", "highway"), section="highway")
        check_one_of("cut", self.cut, CUTS, section="highway")
        check_number("iterations", self.iterations, at_least=-1, whole=True, section="highway")
        check_number("tolerance", self.tolerance, at_least=0, below=1, section="highway")
        check_number("exact_fraction", self.exact_fraction, at_least=0, at_most=1, section="highway")
        for key in ("fit_gain", "tolerance"):
            if self.iterations == 0 and (value := getattr(self, key)):
                shown = "true" if value is True else value
                raise ValueError(
                    f"[highway] {key} = {shown} with iterations = 0: no block computes the gradient of its input "
                    f"there, so there is nothing to read it from. Set iterations = 1 or more, or remove {key}"
                )
        watched = {key: getattr(self, key) for key in ("fit_gain", "tolerance", "log_cosine")}
        if self.cut == "stage" and any(watched.values()):
            key = next(key for key, value in watched.items() if value)
            raise ValueError(
                f'[highway] {key} with cut = "stage": no stage compares rounds. Remove {key}, or set cut = "block"'
            )
        if self.cut == "branch" and (self.iterations != 0 or self.log_cosine):
            key, value = ("iterations", self.iterations) if self.iterations else ("log_cosine", "true")
            raise ValueError(
                f'[highway] {key} = {value} with cut = "branch", which makes no input gradients of blocks. Set cut = '
                f'"block", or remove {key}'
            )
