"""The program that stands for Python: it asks the server for a process and lends it its streams.

It hands signals on to the process and ends as it ends. What a process that runs already cannot have (other options,
other variables that libraries read while they are imported) a new Python does.
"""

import json
import os
import resource
import signal
import socket
import sys

HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LIMITS = (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)


def starts_cold(words, at_import):
    """Whether these words, or the environment, ask for a new Python."""
    words = words[1:] if words[:1] in (["-u"], ["-P"]) else words
    if not words or (words[0].startswith("-") and words[0] not in ("-m", "-c")):
        return True
    return any(os.environ.get(name) != value for name, value in at_import.items())


def request(words, ignored):
    """What the process is to be like, as text."""
    signals = [[number, number in ignored] for number in HANDED_ON]
    limits = [[limit, *resource.getrlimit(limit)] for limit in LIMITS]
    environment = dict(os.environ)
    parts = {"words": words, "environment": environment, "folder": os.getcwd(), "limits": limits, "signals": signals}
    return json.dumps(parts).encode()


def main(words):
    """Run a process to its end, and end in the same way."""
    with open(os.path.join(os.path.dirname(sys.argv[0]), "settings.json")) as stream:
        settings = json.load(stream)
    if starts_cold(words, settings["at_import"]):
        os.execv(settings["python"], [settings["python"], *words])
    process, early = None, []

    def hand_on(number, frame):
        if process is None:
            early.append(number)
        else:
            os.kill(process, number)

    ignored = [number for number in HANDED_ON if signal.getsignal(number) == signal.SIG_IGN]
    for number in HANDED_ON:  # those that are ignored too: the process may yet listen to them
        signal.signal(number, hand_on)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(settings["socket"])
    text = request(words, ignored)
    socket.send_fds(connection, [len(text).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(text)
    process = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
    if not process:
        sys.exit("the server of warm Pythons has ended; its traceback is among the output of pytest")
    for number in early:
        os.kill(process, number)
    answer = connection.recv(4, socket.MSG_WAITALL)
    status = int.from_bytes(answer, "big", signed=True) if answer else -signal.SIGKILL
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


main(sys.argv[1:])
