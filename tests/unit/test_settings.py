"""The sample file and the reference page agree with the tree, and with git."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from ogelproxy.config import Config
from ogelproxy.settings import manual, sample

ROOT = Path(__file__).parents[2]


def test_the_sample_in_git_is_the_one_that_is_printed() -> None:
    assert (ROOT / "docker" / "ogelproxy.toml").read_text() == sample()


def test_the_page_in_git_is_the_one_that_is_printed() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == manual()


def test_settings_that_were_dumped_are_restored_with_their_secrets() -> None:
    config = Config.load(
        None,
        {
            "O7S_SECRET_KEY": "a secret that is long enough",
            "OGELPROXY_LISTEN_PROXY_PROTOCOL": "10.0.0.0/8, fd00::/8",
            "OGELPROXY_TLS_CERT": "/etc/tls.pem",
            "OGELPROXY_WORKERS": "3",
        },
    )
    assert Config.restore(config.dump()) == config
    assert b"a secret that is long enough" in config.dump()


def test_the_sample_sets_nothing_as_it_is() -> None:
    tree = tomllib.loads(sample())
    assert Config.model_validate(tree) == Config()


def test_the_sample_with_every_setting_uncommented_is_the_defaults() -> None:
    uncommented = re.sub(r"(?m)^#(\w+ = .+)$", r"\1", sample())
    tree = tomllib.loads(uncommented)
    assert Config.model_validate(tree) == Config()
    assert tree["pool"]["max_servers"] == Config().pool.max_servers


def test_both_name_every_setting() -> None:
    for setting in Config.settings():
        assert f"`{setting}`" in manual()
        name = setting.rpartition(".")[2]
        assert re.search(rf"(?m)^#{name} =", sample())
