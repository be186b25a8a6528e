# A server for OpenAI clients, on the CPU. It holds the demo model; take yours from a folder:
#
#     docker build -t edge-shiftkv .
#     docker run --rm -p 127.0.0.1:8080:8080 edge-shiftkv
#     docker run --rm -p 127.0.0.1:8080:8080 -v ~/models:/models:ro edge-shiftkv serve -m /models/model.gguf --host 0.0.0.0

FROM python:3.12-slim-bookworm AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir .
# For CPUs with AVX2, or any of Arm's; --build-arg LIBRARY= tunes it for the CPU that builds it.
ARG LIBRARY=--no-native
RUN --mount=type=cache,target=/root/.cache/edge_shiftkv edge-shiftkv build $LIBRARY --no-install --wheel-dir /wheels
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir /wheels/llama_cpp_python-*.whl "$(echo /wheels/edge_shiftkv-*.whl)[server,hub]"
RUN edge-shiftkv doctor \
    && ln -s "$(python -c 'from edge_shiftkv._paths import models_dir; print(models_dir())')" /demo \
    && useradd --create-home edge
USER edge
EXPOSE 8080
HEALTHCHECK CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health')"]
ENTRYPOINT ["edge-shiftkv"]
CMD ["serve", "-m", "/demo/demo-text-q8_0.gguf", "--mmproj", "/demo/demo-mmproj-f16.gguf", "--host", "0.0.0.0"]
