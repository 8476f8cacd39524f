"""Graph capture and the decoding of videos, which exclude each other."""

import threading

# Held while a CUDA graph is captured, and while videos are decoded: a decoder on the GPU allocates, frees and waits for the device
# as it likes. Waiting for a device that is capturing is an error, and spoils the capture whatever its mode.
no_capture = threading.Lock()
