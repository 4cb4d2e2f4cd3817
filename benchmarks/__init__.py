"""What was measured with the package, and how: run as ``python -m benchmarks.NAME`` in the root of a checkout.

    common          what several share: rules, tasks, the runner, intervals, tables, timing
    corpora         the text and the images that experiments learn from, and how they are made dirty

    single_pass     what teaching saves in a single pass over text, all costs charged
    long_windows    the recommended rule where it could harm
    convergence     every rule of the teacher on small text, in many passes
    vision          what teaching saves on images, in many passes
    cheaper_steps   what [freezing] and [highway] save, and at what loss
    highway         a pipeline's step by highway backpropagation against the stock schedules
    weights         the bias that the weights of a soft draw leave

    speed           the time and memory of steps and of their parts

An experiment is a package whose command is its ``__main__.py``. README.md says what each asks and costs. Nothing in
titan_attent imports this package.
"""
