"""What a server counts, as Prometheus reads it."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PATHS = ("/predict", "/predict-many", "/occlusion", "/info", "/health", "/ready", "/metrics")


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "mixlab"}
        self.requests = Counter("requests", "Requests answered", ["path", "status"], **own)
        self.seconds = Histogram("request_seconds", "From a request to its answer", ["path"], **own)
        self.pictures = Counter("pictures", "Images or sounds classified", **own)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch_size = Histogram(
            "batch_size", "Images or sounds that went through the model at once", buckets=sizes, **own
        )
        self.batch_seconds = Histogram("batch_seconds", "Of the model for a batch", **own)
        self.waiting = Gauge("waiting_pictures", "Images or sounds that wait for the model", **own)
        self.waiting_bytes = Gauge("waiting_bytes", "Of bodies that are not decoded yet", **own)
        self.restarts = Gauge("decoder_restarts", "Decoding processes that had to be replaced", **own)

    def observe_request(self, path: str, status: int, seconds: float) -> None:
        """Count an answer; paths that are none of ours count together."""
        known = path if path in PATHS else "other"
        self.requests.labels(known, str(status)).inc()
        self.seconds.labels(known).observe(seconds)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Count a batch."""
        self.pictures.inc(size)
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def text(self, *, waiting: int, waiting_bytes: int, restarts: int) -> bytes:
        """All of it in Prometheus' text format, with what is so at this moment."""
        self.waiting.set(waiting)
        self.waiting_bytes.set(waiting_bytes)
        self.restarts.set(restarts)
        return generate_latest(self.registry)
