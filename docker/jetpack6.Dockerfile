# Jetson Orin with JetPack 6.1 or 6.2: TensorRT 10.3, CUDA 12.6 and Python 3.10 are those of the image. See docs/docker.md.
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0
FROM ${BASE}

# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/pmm-edge
COPY pyproject.toml README.md LICENSE ./
COPY pmm_edge pmm_edge
# TensorRT belongs to the system. It can be found here but not imported, as its DLA compiler is mounted at run time.
RUN python3 -m venv --system-site-packages /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir '.[jetson6]' \
    && /opt/venv/bin/python -c 'from importlib.util import find_spec; assert find_spec("tensorrt"), "no TensorRT"'

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["pmm"]
CMD ["doctor"]
