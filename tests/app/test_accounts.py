"""Logins: kept, ended, and slowed down where they are guessed."""

import json

import pytest

from clear_dit.app import accounts as module
from clear_dit.app.accounts import MAX_LOGINS, MAX_WAIT, Accounts, TooSoon

AUTH = [("ann", "secret"), ("bob", "hidden")]


class Clock:
    """In the place of the module's time."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_login_outlasts_a_restart_and_ends_with_logout_and_a_new_password(tmp_path, clock):
    accounts = Accounts(AUTH, tmp_path / "logins.json")
    one, two = (accounts.log_in("ann", "secret", "10.0.0.1") for _ in range(2))
    again = Accounts(AUTH, tmp_path / "logins.json")
    assert again.account(one) == again.account(two) == "ann"
    again.log_out(one)
    assert again.account(one) is None
    assert again.account(two) == "ann"
    assert Accounts(AUTH, tmp_path / "logins.json").account(one) is None
    assert Accounts([("ann", "new")], tmp_path / "logins.json").account(two) is None
    clock.now += module.KEEP_SECONDS + 1
    assert again.account(two) is None


def test_neither_secrets_nor_passwords_are_on_the_disk(tmp_path):
    accounts = Accounts(AUTH, tmp_path / "logins.json")
    secret = accounts.log_in("ann", "secret", "10.0.0.1")
    text = (tmp_path / "logins.json").read_text()
    assert "ann" in text
    assert secret not in text
    assert "secret" not in text


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"account": "ann"}}'])
def test_a_broken_file_lets_nobody_in(tmp_path, text):
    (tmp_path / "logins.json").write_text(text)
    accounts = Accounts(AUTH, tmp_path / "logins.json")
    assert accounts.account("a") is None
    assert accounts.log_in("ann", "secret", "10.0.0.1")


@pytest.mark.parametrize(
    ("name", "password"), [("ann", "hidden"), ("", ""), ("eve", ""), ("ann", "secret ")]
)
def test_wrong_is_wrong(tmp_path, name, password):
    assert Accounts(AUTH, tmp_path / "logins.json").log_in(name, password, "10.0.0.1") is None


def test_guesses_wait_longer_and_longer(tmp_path, clock):
    """Also the right password waits, so that nothing is learned by the wait."""
    accounts = Accounts(AUTH, tmp_path / "logins.json")
    tried = 0
    end = clock.now + 3600
    while clock.now < end:
        try:
            assert accounts.log_in("ann", f"guess {tried}", "10.0.0.1") is None
            tried += 1
            with pytest.raises(TooSoon):
                accounts.log_in("ann", "secret", "10.0.0.1")
        except TooSoon as error:
            clock.now += error.seconds
    assert tried < 80, "an hour of guesses"
    # From elsewhere her own password is delayed by seconds only.
    clock.now += MAX_WAIT["name"]
    assert accounts.log_in("ann", "secret", "10.0.0.2")


def test_guesses_from_many_addresses_are_slowed_by_name(tmp_path, clock):
    accounts = Accounts(AUTH, tmp_path / "logins.json")
    tried, end = 0, clock.now + 600
    while clock.now < end:
        try:
            accounts.log_in("ann", "guess", f"10.{tried % 250}.0.{tried // 250}")
            tried += 1
        except TooSoon as error:
            clock.now += error.seconds
    assert tried <= 600 / MAX_WAIT["name"] + 5
    assert accounts.log_in("bob", "hidden", "10.9.9.9"), "others are not slowed"


def test_what_is_remembered_is_bounded(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(module, "_MAX_REMEMBERED", 10)
    accounts = Accounts(AUTH, tmp_path / "logins.json")
    for number in range(50):
        accounts.log_in(f"nobody {number}", "x", f"10.0.0.{number}")
        clock.now += 1
    assert len(accounts._wrong) <= 10
    for number in range(MAX_LOGINS + 5):
        last = accounts.log_in("ann", "secret", f"10.0.1.{number}")
    assert len(json.loads((tmp_path / "logins.json").read_text())) == MAX_LOGINS
    assert accounts.account(last) == "ann"
