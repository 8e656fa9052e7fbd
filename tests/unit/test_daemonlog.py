"""Lines of the program's log, and a reader that does not read."""

from __future__ import annotations

import logging
import os
import re

from forwarder.system.daemonlog import PatientHandler


def test_a_reader_that_does_not_read_costs_lines_and_no_time() -> None:
    """A pipe is filled, emptied, and written to again.

    Result: no write blocks, and afterwards the number of lines lost is told.
    """
    read_fd, write_fd = os.pipe()
    handler = PatientHandler(write_fd)
    sent = 5000
    try:
        for number in range(sent):
            handler.emit(logging.makeLogRecord({"msg": f"line {number} {'x' * 100}"}))
        text = os.read(read_fd, 1 << 20)
        whole = re.findall(rb"line \d+ x{100}\n", text)
        assert 100 < len(whole) < sent
        handler.emit(logging.makeLogRecord({"msg": "again"}))
        told, again = os.read(read_fd, 65536).decode().splitlines()
        assert told == f"forwarder: {sent - len(whole)} lines of the log were lost"
        assert again == "again"
    finally:
        os.close(read_fd)
        os.close(write_fd)


def test_a_reader_that_has_gone_is_no_error() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    try:
        PatientHandler(write_fd).emit(logging.makeLogRecord({"msg": "nobody"}))
    finally:
        os.close(write_fd)
