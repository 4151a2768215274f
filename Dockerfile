# A CPU image:   docker build -t prism-meta .
# For NVIDIA GPUs: docker build -t prism-meta:cuda \
#     --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
# Run it on data of your own: docker run --rm -u "$(id -u):$(id -g)" -v "$PWD:/data" prism-meta cases cases
ARG BASE=python:3.12-slim
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The base images of NVIDIA have no Python.
RUN if ! command -v python3 > /dev/null; then \
        apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv && \
        rm -rf /var/lib/apt/lists/*; \
    fi
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
RUN pip install --no-cache-dir torch --index-url "${TORCH_INDEX}"

COPY pyproject.toml README.md LICENSE /src/
COPY prism_meta /src/prism_meta
RUN pip install --no-cache-dir /src && rm -rf /src && prism-meta doctor

# Everybody may write there, so that --user can be anyone.
ENV HOME=/home/user MPLCONFIGDIR=/tmp/matplotlib
RUN useradd --create-home --home-dir /home/user --shell /bin/bash prism && chmod 0777 /home/user
USER prism
WORKDIR /data
ENTRYPOINT ["prism-meta"]
CMD ["--help"]
