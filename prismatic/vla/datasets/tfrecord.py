"""TFRecord files as untrusted input: their framing is checked before TensorFlow reads them, damage is named.

A record is its length (8 bytes), the length's CRC (4), the data, and the data's CRC (4). TensorFlow allocates whatever
the length says before it looks at the file's size, so a wrong one with a right CRC would end the process.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from prismatic.regular_files import check_file, open_file
from prismatic.vla.datasets.tensorflow_setup import load_tensorflow

_HEADER_BYTES, _FOOTER_BYTES = 12, 4


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC_TABLE = _crc_table()


def masked_crc32c(data: bytes) -> int:
    """CRC-32C as TFRecord stores it; meant for a few bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def check_shards(files: Sequence[Path], num_records: Sequence[int]) -> None:
    """Raise ValueError naming the first file that is truncated, damaged, or does not hold that many records.

    Reads 12 bytes a record (an episode); the data's CRCs are TensorFlow's to check.
    """
    for file, wanted in zip(files, num_records, strict=True):
        stat = check_file(file)
        found = _count_records(str(file), stat.st_size, stat.st_mtime_ns)
        if found != wanted:
            raise ValueError(
                f"{file} holds {found} episodes, dataset_info.json says {wanted}: it is half-written"
            )


@lru_cache(maxsize=4096)
def _count_records(file: str, size: int, modified_ns: int) -> int:
    """Number of records; the size and time are part of the cache's key."""
    position = count = 0
    with open_file(file) as data:
        while position < size:
            data.seek(position)
            header = data.read(_HEADER_BYTES)
            length = int.from_bytes(header[:8], "little")
            if len(header) < _HEADER_BYTES:
                raise ValueError(
                    f"{file} ends within a record at byte {position}: it is half-written"
                )
            if masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
                raise ValueError(
                    f"{file} is damaged at byte {position}: a record's length does not match its CRC"
                )
            position += _HEADER_BYTES + length + _FOOTER_BYTES
            if position > size:
                raise ValueError(
                    f"{file} ends within a record of {length} bytes: it is half-written"
                )
            count += 1
    return count


def find_damage(files: Sequence[Path]) -> str | None:
    """What is wrong with the first file whose data does not match its CRCs; None if all do. Reads everything."""
    tf = load_tensorflow()
    for file in files:
        try:
            for _ in tf.data.TFRecordDataset(str(file)):
                pass
        except tf.errors.DataLossError as error:
            return f"{file} is damaged: {error.message}"
    return None
