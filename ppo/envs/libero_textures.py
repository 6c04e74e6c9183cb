"""One copy of LIBERO's textures for all simulators of a process.

Two thirds of a compiled model are its textures (189 of 284 MB with LIBERO's own assets), and the tasks of a suite
mostly have the same ones. MuJoCo copies them into each model and reads them only when it makes a model ready to be
drawn. Here the memory pages that hold them are replaced by a private mapping of anonymous shared memory with the same
content. Code that reads or even writes the model sees no difference, and each further simulator takes a third of the
memory.
"""

import ctypes
import mmap
import os
import weakref
import zlib

import numpy as np

from ppo.envs import libero_install

with libero_install.mujoco_without_gl():
    import mujoco

# glibc gives a block of more than 32 MiB its own mapping, and `free` unmaps that as a whole, replaced pages included.
SMALLEST_BLOCK_BYTES = 64 << 20
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value
# With one of these set, another allocator may own the memory, or glibc may keep large blocks in its heap.
_ALLOCATOR_VARIABLES = (
    "LD_PRELOAD",
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
)


class SharedTextures:
    """Whole pages of texture data in anonymous shared memory, which is freed with its last user."""

    def __init__(self, content: np.ndarray) -> None:
        self.fd = os.memfd_create("libero_textures")
        weakref.finalize(self, os.close, self.fd)
        with open(self.fd, "wb", closefd=False) as file:
            file.write(content.data)

    def equals(self, content: np.ndarray) -> bool:
        """Whether the memory holds exactly this."""
        with mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ) as memory:
            held = np.frombuffer(memory, np.uint8)
            is_equal = np.array_equal(held, content)
            del held  # a mapping that an array refers to cannot be closed
        return is_equal


_known: "weakref.WeakValueDictionary[tuple[int, int, int], SharedTextures]" = (
    weakref.WeakValueDictionary()
)


def can_share() -> bool:
    """Whether this process's memory comes from glibc's own allocator with its usual settings."""
    is_glibc = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    return is_glibc and not any(map(os.environ.get, _ALLOCATOR_VARIABLES))


def share_textures(model: mujoco.MjModel) -> SharedTextures | None:
    """Let `model` and the models shared before it that have equal textures use one copy of them.

    Returns an object to keep while later models are to share the copy. Returns None, and changes nothing, if the model
    is small or `can_share` says no.

    Raises OSError when the system refuses the mapping.
    """
    if model.nbuffer < SMALLEST_BLOCK_BYTES or not can_share():
        return None
    content, address = _whole_pages(model.tex_data)
    if not content.size:
        return None
    key = (content.size, address - model.tex_data.ctypes.data, zlib.crc32(content.data))
    textures = _known.get(key)
    if textures is None or not textures.equals(content):
        textures = _known[key] = SharedTextures(content)
    map_memory = ctypes.CDLL(None, use_errno=True).mmap
    map_memory.restype = ctypes.c_void_p
    map_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    if map_memory(address, content.size, protection, flags, textures.fd, 0) == _FAILED:
        raise OSError(ctypes.get_errno(), "the memory of textures cannot be shared")
    return textures


def _whole_pages(array: np.ndarray) -> tuple[np.ndarray, int]:
    """The part of a byte array that fills whole pages, and its address."""
    address, size = array.ctypes.data, array.nbytes
    first = -address % mmap.PAGESIZE
    last = max(first, size - (address + size) % mmap.PAGESIZE)
    return array.reshape(-1)[first:last], address + first
