# The commands in a container. By default it runs the quickstart, which makes its data and scorers, and trains twice.
#   docker build -t titan_attent .
#   mkdir -p outputs                              # so that it belongs to you, and not to root
#   docker run --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD/outputs:/workspace/outputs" titan_attent
# Without a GPU, leave --gpus all out. To run your own configuration and data, mount them; the paths in my.toml are paths
# in the container:
#   docker run --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD/my.toml:/workspace/my.toml:ro" \
#       -v "$PWD/data:/workspace/data" -v "$PWD/outputs:/workspace/outputs" titan_attent \
#       torchrun --standalone --nproc_per_node=gpu -m titan_attent.train --job.config_file my.toml

# No CUDA in the image itself: torch's wheels bring theirs, and the host's driver comes with --gpus.
FROM python:3.12-slim
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PYTHONUNBUFFERED=1

# Triton and torch.compile build small programs.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*

# The dependencies change less often than the code, so they come first.
COPY requirements.lock /tmp/
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir --requirement /tmp/requirements.lock

# Any user may write here: data of the quickstart, outputs, caches. VENV is the environment that the scripts use.
WORKDIR /workspace
ENV PATH=/venv/bin:$PATH VENV=/venv HOME=/workspace USER=trainer
RUN mkdir -p data outputs && chmod 777 . data outputs

COPY pyproject.toml README.md LICENSE ./
COPY titan_attent ./titan_attent
RUN pip install --no-cache-dir --no-deps --constraint /tmp/requirements.lock .
COPY train_configs ./train_configs
COPY scripts ./scripts
# The file that scripts/environment.sh writes: with it, the scripts do not install the environment again.
RUN cat pyproject.toml scripts/constraints.txt > /venv/installed.toml
USER 1000
CMD ["bash", "scripts/quickstart.sh"]
