# syntax=docker/dockerfile:1.7
# One image for serving and for fine-tuning workers. The CUDA runtime is also right for a machine without a GPU, where
# the ONNX Runtime engine runs on the CPU.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04

FROM ${CUDA_IMAGE} AS build
ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/hueshift
WORKDIR /src
# Dependencies first: they change seldom and are most of the image.
COPY pyproject.toml constraints.txt ./
RUN /opt/hueshift/bin/pip install --upgrade pip==25.3 \
 && /opt/hueshift/bin/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; e = p['optional-dependencies']; print('\n'.join(sum([e[k] for k in ('onnx', 'gpu', 'postgres', 's3', 'ray')], p['dependencies'])))" > requirements.txt \
 && /opt/hueshift/bin/pip install -c constraints.txt -r requirements.txt
COPY LICENSE README.md ./
COPY proto proto
COPY kernels kernels
COPY adapters adapters
COPY engines engines
COPY training training
COPY server server
COPY client client
COPY models models
COPY examples examples
# A regular install, not an editable one: the image holds hueshift/ alone, and no bare `kernels` is on the path.
RUN /opt/hueshift/bin/pip install --no-deps .

FROM ${CUDA_IMAGE} AS run
# Triton builds its launcher with a C compiler and Python's headers when the first kernel runs, torch.compile its guards
# with a C++ compiler: without them a GPU engine does not start.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ gcc libc6-dev python3 python3-dev tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --create-home --home-dir /var/lib/hueshift hueshift \
 && install -d -o hueshift -g hueshift /data /cache
COPY --from=build /opt/hueshift /opt/hueshift
# PYTHONSAFEPATH keeps the working directory off the module path. Triton and torch.compile compile into caches, bounded by
# the volume.
ENV PATH=/opt/hueshift/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    HUESHIFT_SERVER__HOST=0.0.0.0 \
    HUESHIFT_SERVER__METRICS_HOST=0.0.0.0 \
    HUESHIFT_STORE__PATH=/data \
    HUESHIFT_STORE__CACHE_PATH=/cache
USER 10001:10001
WORKDIR /var/lib/hueshift
VOLUME ["/data", "/cache"]
EXPOSE 50051 9464
# A first start exports the graphs of the base model: minutes for a large one. With TLS: `hueshift health --tls-ca ...`.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 CMD ["hueshift", "health"]
# Longer than server.drain_seconds, so that SIGTERM loses no accepted request: see stop_grace_period in compose.yaml.
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "hueshift"]
CMD ["serve"]
