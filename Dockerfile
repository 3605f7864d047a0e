# syntax=docker/dockerfile:1
#
# Two images from one file:
#
#   docker build --target compress -t ercsvd-compress .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" ercsvd-compress run recipes/demo-lowrank.yaml
#
#   docker build --target serve -t ercsvd-serve .
#   docker run --rm --gpus all -p 8000:8000 -v "$PWD/out/tiny-llama-erc20:/model:ro" ercsvd-serve
#
# `compress` has everything that a recipe needs, but vLLM: the gate serving_parity, which recipes/demo.yaml has, is
# for a machine with both, or left out with --set gates.serving_parity=null. Which build of torch it gets is up to pip's settings, or
# to --build-arg TORCH_INDEX=URL, the CPU or CUDA index of PyTorch.
# `serve` is stock vLLM and the plugin, nothing else.

ARG PYTHON_VERSION=3.11
ARG VLLM_VERSION=v0.32.0

FROM python:${PYTHON_VERSION}-slim AS wheel
WORKDIR /src
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# Nothing needs a compiler: dependencies are wheels, or sources in plain Python.
FROM python:${PYTHON_VERSION}-slim AS environment
RUN python -m venv /opt/ercsvd
ENV PATH=/opt/ercsvd/bin:$PATH
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX
# torch in a layer of its own: it is large, and changes less often than the package.
RUN pip install --no-cache-dir 'setuptools>=77' wheel \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(ls /wheels/*.whl)[compress,hub,report,eval]"

FROM python:${PYTHON_VERSION}-slim AS compress
RUN useradd --create-home --uid 10001 ercsvd \
    && install --directory --owner ercsvd --mode 0777 /work /cache
COPY --from=environment /opt/ercsvd /opt/ercsvd
# /cache is writable for any user: --user with one's own id keeps the results one's own.
ENV PATH=/opt/ercsvd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache
USER ercsvd
WORKDIR /work
ENTRYPOINT ["ercsvd"]
CMD ["--help"]

FROM vllm/vllm-openai:${VLLM_VERSION} AS serve
USER root
# --no-deps: the plugin's requirements are vLLM's own, and its torch must not be replaced.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    if command -v uv >/dev/null; then uv pip install --system --no-cache --no-deps /wheels/*.whl; \
    else python3 -m pip install --no-cache-dir --no-deps /wheels/*.whl; fi \
    && python3 -c 'from importlib.metadata import entry_points as e; e(group="vllm.general_plugins")["ercsvd"]' \
    && useradd --create-home --uid 10001 ercsvd
ENV HOME=/home/ercsvd \
    HF_HOME=/home/ercsvd/.cache/huggingface \
    VLLM_CACHE_ROOT=/home/ercsvd/.cache/vllm
USER ercsvd
WORKDIR /home/ercsvd
EXPOSE 8000
# Loading and compiling a large model takes minutes; until then the container is starting, not ill.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--port", "8000"]
