# docker build --tag REGISTRY/open-brumby:0.1.0 .
# PyTorch's wheel brings CUDA and NCCL; the host has the driver. Triton and DeepSpeed compile with g++ and Python's
# headers at run time; NCCL finds InfiniBand through the verbs libraries.
FROM python:3.12.11-slim-bookworm
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ ibverbs-providers libibverbs1 \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/open-brumby
COPY . .
RUN pip install -e .
