# Runs `moefold` on NVIDIA GPUs. This file has not been built by us: no machine of ours has had both Docker and the network.
#
#     docker build -t moefold .
#     docker run --gpus all --ipc host --volume "$PWD:/work" moefold fit --config finetune.yaml
#
# --ipc host: data loaders and NCCL share memory. The user in the container has the number 1000; what it writes into /work is
# his, so give `--user "$(id -u):$(id -g)"` if yours is another.

FROM python:3.12-slim

# torch brings its own CUDA libraries; Triton compiles a small launcher for its kernels.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 moefold
WORKDIR /opt/moefold

# First what seldom changes. On Linux x86_64 the default build of torch is the one for CUDA.
RUN pip install --no-cache-dir "torch==2.13.0"
COPY pyproject.toml README.md LICENSE ./
COPY lightning_moefold lightning_moefold
RUN pip install --no-cache-dir ".[cli,data,hf,plot,wandb]" && python -c "import torch; assert torch.version.cuda"

USER moefold
# Writable under any --user: caches of Triton, of the hub, and of matplotlib.
ENV HOME=/tmp HF_HOME=/tmp/huggingface OMP_NUM_THREADS=1
WORKDIR /work
ENTRYPOINT ["moefold"]
CMD ["--help"]
