# A server of one model, on CPUs. Build it from the root of the project, and give it weights and a token when it starts:
#   docker build -f docs/launch/serve.Dockerfile -t mixlab-serve .
#   docker run -p 8000:8000 -e MIXLAB_TOKEN -v "$PWD/runs/first:/model:ro" mixlab-serve
# Callers under another name than localhost need it said; what follows the image replaces CMD:
#   docker run ... mixlab-serve /model --host 0.0.0.0 --port 8000 --name my.machine.example
FROM python:3.12-slim
COPY . /src
# The wheels of PyTorch for CPUs: without CUDA's libraries the image is several GB smaller.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    -c /src/constraints.txt '/src[serve]' && rm -rf /src \
    && useradd --create-home --uid 1000 mixlab
USER 1000
WORKDIR /home/mixlab
ENV PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["mixlab", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--port", "8000"]
