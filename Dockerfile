# The training command in a container:
#   docker build -t titan_attent .
#   docker run --gpus all --ipc=host -v "$PWD/data:/workspace/data" -v "$PWD/outputs:/workspace/outputs" titan_attent \
#       torchrun --standalone --nproc_per_node=8 -m titan_attent.train --job.config_file train_configs/quickstart.toml
# Mounted folders must be writable by user id 1000.
FROM nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12 python3.12-venv python3.12-dev gcc g++ \
    && rm -rf /var/lib/apt/lists/* \
    && (id -u ubuntu >/dev/null 2>&1 && userdel --remove ubuntu || true) \
    && useradd --uid 1000 --create-home trainer \
    && mkdir /workspace /venv && chown trainer:trainer /workspace /venv

USER trainer
WORKDIR /workspace
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1

# The pinned dependencies first: they change less often than the code.
COPY --chown=trainer:trainer requirements.lock pyproject.toml README.md ./
COPY --chown=trainer:trainer titan_attent ./titan_attent
RUN python3.12 -m venv /venv && pip install --no-cache-dir --constraint requirements.lock .

COPY --chown=trainer:trainer train_configs ./train_configs
COPY --chown=trainer:trainer scripts ./scripts
CMD ["torchrun", "--standalone", "--nproc_per_node=gpu", "-m", "titan_attent.train", \
     "--job.config_file", "train_configs/quickstart.toml"]
