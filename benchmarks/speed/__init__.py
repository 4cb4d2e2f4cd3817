"""The time and memory of steps and of their parts: ``python -m benchmarks.speed.NAME [--output FILE]``.

    step_time.py      a whole step: torchtitan's own trainer against the teaching one
    vision_step.py    images per second: the product's steps against a plain loop
    gpu_steps.py      steps with [freezing] and [highway] against backpropagation through everything
    loss.py           torchtitan's cross-entropy against the per-example loss
    distillation.py   KL with a source's logits, and with ids, against two compiled cross-entropies
    distilled_step.py a whole step with targets on disk against one without distillation
    folding.py        the loss folded by document against torchtitan's cross-entropy
    exchange.py       one packed flush of losses every 16 steps against a gather in every step
    selection.py      a whole draw against gathering the scores
    reading.py        positioned reads and lasting threads against memory maps and nodes made anew
    documents.py      packed windows of documents against torchtitan's loader, streaming and plain reads
    documents_streaming.py   the streaming process of documents.py
    adopting.py       adopting token files against sha256sum; reading them against our own shards and streaming
    adopt_real.py     adopted files of the real writers against what the writers' own readers give
    adopt_writers.py  the process of adopt_real.py with the writers' packages
    writing.py        the text writer against bare encoding and datatrove; its memory
    writing_datatrove.py     the datatrove process of writing.py
    report.py         reading the events of many runs against TensorBoard's own reader
    editing.py        edits of checkpoints against copying them, and against mergekit
    start.py          --help, typos and refusals against the commit db29f37
    hyla.py           HYLA's tiled attention against its plain form and torch's softmax attention
    tasks.py          the generators of learning tasks against plain Python loops
    packing.py        packing documents into windows against reading them, and the padding that is left

Each prints a table and writes a JSON with its command, machine, load and versions (common/measure.py).
"""
