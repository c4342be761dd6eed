# The test suite on an AMD GPU:
#   docker build -f ci/rocm.Dockerfile -t portable_mla:rocm .
#   docker run --rm --device=/dev/kfd --device=/dev/dri --group-add video --ipc=host --shm-size 16g \
#     -e PORTABLE_MLA_TEST_REQUIRE=gfx942 portable_mla:rocm
# With --entrypoint bash before the image's name, the same image serves `ci/run.sh guarded` and, where AITER is
# installed, the table beside it: `ci/run.sh aiter`.
ARG BASE=rocm/pytorch:rocm10.0_ubuntu24.04_py3.12_pytorch_release_2.13.0
FROM ${BASE}

WORKDIR /portable_mla
COPY pyproject.toml README.md ./
COPY portable_mla portable_mla
COPY backends backends
COPY tests tests
COPY ci ci

# The set-up builds on the image's torch and triton; a torch from elsewhere would have no HIP.
RUN bash ci/run.sh setup \
    && .venv/bin/python -c "import torch, triton; assert torch.version.hip, torch.__version__"

ENTRYPOINT ["bash", "ci/run.sh", "gpu"]
