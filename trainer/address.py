"""Addresses of other machines: which can be used, and how to show one without its secrets."""

import os
import re

import fsspec
from fsspec.config import conf

SECRET = re.compile("KEY|SECRET|TOKEN|PASS", re.I)  # in the names of variables and options
SECRET_IN_URL = re.compile(rf"://[^/]*:(?!\d*(/|$))|[?&][^=]*(sig|{SECRET.pattern})[^=]*=", re.I)


def mirror_problems(url: str) -> list[str]:
    """What is wrong with ``--checkpoint_mirror``; empty if it can be used."""
    if SECRET_IN_URL.search(url):  # which the message must not repeat
        return [
            "--checkpoint_mirror contains a password, or a port that is not a number. Flags end up "
            "in logs: use an ssh key, ~/.aws or an environment variable instead."
        ]
    try:
        if "::" in url:  # a cache in the chain could answer when a copy is read back
            raise ValueError
        fsspec.get_filesystem_class(url.partition("://")[0] if "://" in url else "file")
    except ImportError as error:
        module = (getattr(error.__cause__, "name", None) or str(error)).partition(".")[0]
        package = {"smbclient": "smbprotocol"}.get(module, module)  # else the names agree
        return [f"--checkpoint_mirror {url} requires a package: pip install {package}"]
    except ValueError:
        return [
            f"--checkpoint_mirror {url} is not a usable address. Pass a folder, or a URL such as "
            f"sftp://user@host/folder or s3://bucket/folder."
        ]
    return []


def scrub(text: str) -> str:
    """``text`` without passwords in URLs, and without secrets from the environment or fsspec."""
    named = [*os.environ.items(), *(pair for options in conf.values() for pair in options.items())]
    known = {str(value) for name, value in named if SECRET.search(name) and len(str(value)) >= 6}
    for secret in sorted(known, key=len, reverse=True):  # one may contain another
        text = text.replace(secret, "***")
    return re.sub(r"//[^/\s@]*:[^/\s]*@", "//***@", text)
