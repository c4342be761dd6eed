# The test suite on an NVIDIA GPU:
#   docker build -f ci/cuda.Dockerfile -t portable_mla:cuda .
#   docker run --rm --gpus all --ipc=host -e PORTABLE_MLA_TEST_REQUIRE=sm90 portable_mla:cuda
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE}

# Triton compiles its launchers with the system's C compiler against Python's headers.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /portable_mla
COPY pyproject.toml README.md ./
COPY portable_mla portable_mla
COPY backends backends
COPY tests tests
COPY ci ci

# A build sees no GPU, so the build of torch is named.
RUN CI_TORCH=cuda bash ci/run.sh setup

ENTRYPOINT ["bash", "ci/run.sh", "gpu"]
