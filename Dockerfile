# The commands in a container. By default it runs the quickstart, which makes its data and scorers, and trains twice.
#   docker build -t titan_attent .
#   docker run --gpus all --ipc=host -v "$PWD/outputs:/workspace/outputs" titan_attent
# To run your own configuration and data, mount them; the paths in my.toml are paths in the container:
#   docker run --gpus all --ipc=host -v "$PWD/my.toml:/workspace/my.toml" -v "$PWD/data:/workspace/data" \
#       -v "$PWD/outputs:/workspace/outputs" titan_attent \
#       torchrun --standalone --nproc_per_node=gpu -m titan_attent.train --job.config_file my.toml
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
# VENV: the environment that the scripts use.
ENV PATH=/venv/bin:$PATH VENV=/venv PYTHONUNBUFFERED=1

# The pinned dependencies come first, as they change less often than the code.
COPY --chown=trainer:trainer requirements.lock pyproject.toml README.md ./
COPY --chown=trainer:trainer titan_attent ./titan_attent
RUN python3.12 -m venv /venv && pip install --no-cache-dir --constraint requirements.lock .

COPY --chown=trainer:trainer train_configs ./train_configs
COPY --chown=trainer:trainer scripts ./scripts
# The file that scripts/environment.sh writes: with it, the scripts do not install the environment again.
RUN cat pyproject.toml scripts/constraints.txt > /venv/installed.toml
CMD ["bash", "scripts/quickstart.sh"]
