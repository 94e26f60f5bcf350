# Jetson Orin and Thor with JetPack 7.2: NVIDIA's image for Arm servers (SBSA) with TensorRT 10.16. See docs/docker.md.
ARG BASE=nvcr.io/nvidia/tensorrt:26.04-py3
FROM ${BASE}

# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/pmm-edge
COPY pyproject.toml README.md LICENSE ./
COPY pmm_edge pmm_edge
# TensorRT belongs to the system. NVIDIA's images may pin packages in PIP_CONSTRAINT, which is for their own environment.
RUN python3 -m venv --system-site-packages /opt/venv \
    && PIP_CONSTRAINT='' /opt/venv/bin/pip install --no-cache-dir '.[jetson7]' \
    && /opt/venv/bin/python -c 'from importlib.util import find_spec; assert find_spec("tensorrt"), "no TensorRT"'

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["pmm"]
CMD ["doctor"]
