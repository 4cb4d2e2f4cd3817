"""The teacher in other training frameworks, which are installed by ``pip install .[huggingface,lightning]``.

teaching.py      what the adapters share: buffer, teacher and sampler of a data-parallel group
huggingface.py   a Trainer of Hugging Face's transformers whose batches the teacher selects
lightning.py     a callback for Lightning, and the loader that goes with it
"""
