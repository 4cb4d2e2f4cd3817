"""The experiments with this package: run ``python -m benchmarks.NAME`` in the root of a checkout.

    common          shared code: rules, tasks, the runner, intervals, tables, timing
    corpora         the text and the images that experiments train on, and how they are corrupted

    single_pass     what teaching saves in a single pass over text, all costs charged
    long_windows    windows or documents, where windows hold several documents
    convergence     every rule of the teacher on small text, in many passes
    instructions    what teaching saves in fine-tuning on instruction pairs
    vision          what teaching saves on images, in many passes
    editing         what task vectors and means of checkpoints do
    parity          what intermediate steps change in k-parity: twelve cells of one paper
    seeds           whether randomised algorithms appear where the worst inputs are trained
    cheaper_steps   what [freezing] and [highway] save, and at what loss
    highway         the step time of a pipeline with highway backpropagation against the stock schedules
    distillation    whether students learn sooner from intermediate checkpoints of their source
    distillation_text   what distillation saves on text, in two domains
    hyla            whether attention as a hypernetwork generalises to combinations that were not trained
    mot             what three stages of a mixture of transformers do, with controls
    weights         the bias that remains with the weights of a soft draw

    speed           the time and memory of steps and of their parts

An experiment is a package whose command is its ``__main__.py``. README.md gives the question and the cost of each.
Nothing in titan_attent imports this package.
"""
