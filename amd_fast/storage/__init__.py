"""Files that lie elsewhere: ``s3://`` and every other URI that fsspec knows, read through a local cache of bounded size.

Paths of this machine go through the functions for reading unchanged, so that callers need not tell them apart.
"""

from __future__ import annotations

from amd_fast.storage.cache import Lease, cache_folder, lease, local
from amd_fast.storage.folders import files_below, open_folder, upload_folder, uploaded_folder, working_folder
from amd_fast.storage.remote import exists, is_folder, is_unreachable, list_below, read_bytes, remove, upload, write_bytes
from amd_fast.storage.uris import absolute, base_name, is_remote, is_uri, join, parent, plain

__all__ = [
    "Lease",
    "absolute",
    "base_name",
    "cache_folder",
    "exists",
    "files_below",
    "is_folder",
    "is_remote",
    "is_unreachable",
    "is_uri",
    "join",
    "lease",
    "list_below",
    "local",
    "open_folder",
    "parent",
    "plain",
    "read_bytes",
    "remove",
    "upload",
    "upload_folder",
    "uploaded_folder",
    "working_folder",
    "write_bytes",
]
