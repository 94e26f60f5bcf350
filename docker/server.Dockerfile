# A server with TensorRT 11.2 and CUDA 13.3 of the image, and ONNX Runtime with its CUDA provider. See docs/docker.md.
ARG BASE=nvcr.io/nvidia/tensorrt:26.08-py3
FROM ${BASE}

# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/pmm-edge
COPY pyproject.toml README.md LICENSE ./
COPY pmm_edge pmm_edge
# Not the extra trt: it would install a second TensorRT. PIP_CONSTRAINT may pin packages of NVIDIA's own environment.
RUN python3 -m venv --system-site-packages /opt/venv \
    && PIP_CONSTRAINT='' /opt/venv/bin/pip install --no-cache-dir '.[gpu]' 'cuda-python>=13' \
    && /opt/venv/bin/python -c 'from importlib.util import find_spec; assert find_spec("tensorrt"), "no TensorRT"'

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["pmm"]
CMD ["doctor"]
