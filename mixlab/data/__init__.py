"""From a data set to batches of any kind of example. A modality is a folder here and a line below."""

from mixlab.data.audio.modality import EMBEDDED as EMBEDDED_SOUNDS
from mixlab.data.audio.modality import SOUNDS
from mixlab.data.images.known import EMBEDDED
from mixlab.data.images.modality import IMAGES
from mixlab.data.modality import register

register(IMAGES, EMBEDDED)
register(SOUNDS, EMBEDDED_SOUNDS)
