# The image of the section "In batch" of README.md: commands, notebooks, and workers of a Dask cluster.
#   docker build -t my/zsad_nb .                            for processors: PyTorch's CPU wheels
#   docker build -t my/zsad_nb --build-arg DEVICE=cuda .    for GPUs: PyPI's PyTorch, which carries several GB of CUDA
#   docker run --rm -v "$PWD:/work" my/zsad_nb zsad predict photos --out results
ARG PYTHON=3.12

# What a clone needs to make its own environment; .devcontainer/devcontainer.json stops here.
FROM python:${PYTHON}-slim AS base
RUN apt-get update \
 && apt-get install -y --no-install-recommends git make \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 zsad \
 && mkdir /work \
 && chown zsad /work
ENV MPLBACKEND=Agg \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

FROM base AS image
ARG DEVICE=cpu
WORKDIR /opt/zsad_nb
COPY constraints.txt settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY zsad_nb zsad_nb
COPY nbs/experiments nbs/experiments
COPY nbs/tutorials nbs/tutorials
RUN case "$DEVICE" in \
      cpu) wheels="--extra-index-url https://download.pytorch.org/whl/cpu" ;; \
      cuda) wheels="" ;; \
      *) echo "DEVICE=$DEVICE: use cpu or cuda" >&2; exit 1 ;; \
    esac \
 && pip install -c constraints.txt $wheels torch torchvision ".[cluster,engines,lab]"
USER zsad
WORKDIR /work
# No ENTRYPOINT: dask-kubernetes starts scheduler and workers by their own commands.
CMD ["zsad", "--help"]
