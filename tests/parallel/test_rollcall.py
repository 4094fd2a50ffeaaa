"""Real processes without JAX meet on loopback, or are told who is missing."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

# Joins and watches as training does; prints what it learns, then lives by the lines of stdin.
MEMBER = """
import os, sys, time
from gemjax.parallel.peers import TOLD, Peers
from gemjax.parallel.place import ProcessError, resolve
from gemjax.parallel.rollcall import Roll, answer_roll

place = resolve(os.environ)
try:
  if place.index:
    connection, port = answer_roll(place, float(sys.argv[1]))
    members, hosts = {0: connection}, {}
  else:
    roll = Roll(place)
    roll.call(float(sys.argv[1]))
    roll.tell(port=4321)
    members, hosts, port = roll.came, roll.hosts, 4321
except ProcessError as error:
  sys.exit(f"error: {error}")
print("joined", port, flush=True)
try:
  with Peers(place, members, hosts, stall_seconds=float(sys.argv[2])) as peers:
    for line in sys.stdin:
      word = line.split()[0]
      if word == "end":
        break
      if word == "agree":
        peers.agree_to_end()
      elif word == "raise":
        raise OSError("the disk is gone")
      elif word == "endless":
        peers.phase("preparing", endless=True)
      else:
        peers.phase(word)
except OSError as error:
  print(f"error: {error}", file=sys.stderr, flush=True)
  for peers in TOLD:
    peers.leave()
  os._exit(1)
print("ended", flush=True)
"""


@pytest.fixture
def address():
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{found.getsockname()[1]}"


@pytest.fixture
def start(address):
  started = []

  def start(index, count, *, join=20, stall=60, **env):
    names = {
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_NUM_PROCESSES": str(count),
      "JAX_PROCESS_ID": str(index),
    }
    process = subprocess.Popen(
      [sys.executable, "-c", MEMBER, str(join), str(stall)],
      env=os.environ | names | env,
      text=True, bufsize=1,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    started.append(process)
    return process

  yield start
  for process in started:
    process.kill()
    process.communicate()


def joined(*processes):
  for process in processes:
    assert process.stdout.readline() == "joined 4321\n", process.communicate()


def say(process, *words):
  for word in words:
    process.stdin.write(word + "\n")
    process.stdin.flush()


def error_of(process, code=1):
  process.wait(timeout=60)  # With its stdin open, at whose end it would end in order.
  out, err = process.stdout.read(), process.stderr.read()
  assert process.returncode == code, (out, err)
  return err


def test_all_meet_and_part(start):
  members = [start(i, 3) for i in (2, 0, 1)]
  joined(*members)
  for member in members:
    say(member, "a", "b", "end")
    out, err = member.communicate(timeout=60)
    assert (member.returncode, out, err) == (0, "ended\n", "")


def test_who_is_missing_is_named_to_all(start):
  hosts = {"GEMJAX_HOSTS": "alpha,beta,gamma,delta"}
  first, third = start(0, 4, join=3, **hosts), start(2, 4, join=3, **hosts)
  missing = "after 3 s 2 of 4 processes are missing: rank 1 (beta), rank 3 (delta)"
  errors = [error_of(first), error_of(third)]
  assert all(missing in error for error in errors), errors
  assert "waiting: 2 of 4 processes are missing: rank 1 (beta), rank 3 (delta)" in errors[0]


def test_an_address_that_nobody_answers(start, address):
  error = error_of(start(1, 2, join=2))
  assert f"cannot reach the first process at {address} within 2 s (Connection refused)" in error


def test_a_host_that_does_not_exist(start):
  error = error_of(start(1, 2, join=1, JAX_COORDINATOR_ADDRESS="no-such-host.invalid:99"))
  assert "cannot reach the first process at no-such-host.invalid:99" in error


def test_a_port_that_is_taken(start, address):
  with socket.create_server(("", int(address.split(":")[1]))):
    error = error_of(start(0, 2))
  assert "cannot listen on port" in error and "choose another port" in error


def test_another_program_at_the_address(start, address):
  host, port = address.split(":")
  with socket.create_server((host, int(port))) as server:
    process = start(1, 2, join=1)
    server.accept()[0].close()
  error = error_of(process)
  assert "cannot reach the first process" in error


def test_other_programs_that_call_are_turned_away(start, address):
  host, port = address.split(":")
  first = start(0, 2)
  for garbage in (b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b'{"index": "x"}\n', b"\xff" * (1 << 18)):
    for _ in range(200):  # Until it listens.
      try:
        with socket.create_connection((host, int(port))) as stream:
          stream.sendall(garbage)
        break
      except ConnectionRefusedError:
        time.sleep(0.05)
      except OSError:  # It has hung up in the middle.
        break
  second = start(1, 2)
  joined(first, second)


def test_two_of_one_rank_and_two_counts(start):
  first, second = start(0, 3, join=30), start(1, 3, join=30)
  for _ in range(100):
    time.sleep(0.02)
  assert "rank 1 came from" in error_of(start(1, 3))
  assert "rank 2 of 4" in error_of(start(2, 4))
  joined(start(2, 3), first, second)


def test_one_that_died_in_the_roll_call_may_come_again(start):
  first, second = start(0, 3, join=30), start(1, 3)
  time.sleep(1)
  second.send_signal(signal.SIGKILL)
  second.wait()
  joined(start(1, 3), start(2, 3), first)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_death_stops_all(start, rank):
  members = [start(i, 3) for i in range(3)]
  joined(*members)
  members[rank].kill()
  for member in members[:rank] + members[rank + 1 :]:
    assert f"error: rank {rank}" in (error := error_of(member))
    assert "died, last in phase 'start'" in error and "the same command goes on" in error


@pytest.mark.parametrize("rank", [0, 2])
def test_a_failure_is_told_with_its_reason(start, rank):
  members = [start(i, 3) for i in range(3)]
  joined(*members)
  say(members[rank], "reading", "raise")
  for i, member in enumerate(members):
    error = error_of(member)
    if i != rank:
      assert f"error: rank {rank}" in error
      assert "failed in phase 'reading': the disk is gone" in error


def test_the_first_one_ends_when_the_others_have(start):
  members = [start(i, 3) for i in range(3)]
  joined(*members)
  members[1].send_signal(signal.SIGSTOP)  # It cannot: the first one does not wait for ever.
  say(members[0], "raise")
  assert error_of(members[0]) == "error: the disk is gone\n"
  assert members[2].poll() == 1
  members[1].send_signal(signal.SIGCONT)
  assert "error: rank 0" in error_of(members[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_silence_stops_all_others(start, rank):
  members = [start(i, 2, stall=8) for i in range(2)]
  joined(*members)
  members[rank].send_signal(signal.SIGSTOP)
  error = error_of(members[1 - rank])
  assert f"error: rank {rank}" in error and "has been silent for 8 s" in error


def test_the_one_that_is_behind_is_named(start):
  members = [start(i, 3, stall=8) for i in range(3)]
  joined(*members)
  for i, member in enumerate(members):
    say(member, "one", "two", *([] if i == 1 else ["three", "four"]))
  for member in members:
    error = error_of(member)
    assert "error: rank 1" in error, error
    assert "stalled for 8 s in phase 'two' while others wait in 'four'" in error


def test_nobody_is_behind(start):
  members = [start(i, 2, stall=8) for i in range(2)]
  joined(*members)
  for member in members:
    say(member, "one")
  for member in members:
    assert "error: every process stalled for 8 s in phase 'one'" in error_of(member)


def test_whoever_waits_for_an_endless_phase_does_not_stall(start):
  members = [start(i, 2, stall=8) for i in range(2)]
  joined(*members)
  say(members[0], "endless")
  say(members[1], "endless", "next")
  time.sleep(12)
  say(members[0], "next", "end")
  say(members[1], "end")
  assert [error_of(member, 0) for member in members] == ["", ""]


def test_who_ends_by_agreement_stops_nobody(start):
  members = [start(i, 2) for i in range(2)]
  joined(*members)
  for member in members:
    say(member, "agree")
  say(members[0], "raise")
  assert "the disk is gone" in error_of(members[0])
  say(members[1], "more", "end")
  assert error_of(members[1], 0) == ""
