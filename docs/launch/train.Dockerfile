# mixlab for training, with what shards and Hub sets need. Build it from the root of the project:
#   docker build -f docs/launch/train.Dockerfile -t mixlab .
FROM python:3.12-slim
COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt '/src[shards,hf]' && rm -rf /src \
    && useradd --create-home --uid 1000 mixlab
USER 1000
WORKDIR /home/mixlab
ENV OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
