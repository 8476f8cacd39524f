"""The lock between CUDA graph capture and the decoding of videos, which must not run at the same time."""

import threading

# Held while a CUDA graph is captured, and while videos are decoded. A decoder on the GPU allocates, frees and waits for the device
# at any time; waiting for a device that captures is an error and breaks the capture in every mode.
no_capture = threading.Lock()
