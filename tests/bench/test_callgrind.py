"""Callgrind's file: instructions where they were spent, each once."""

from __future__ import annotations

from bench.callgrind import parts

FILE = """\
version: 1
desc: Trigger: Client Request: once
events: Ir
ob=/lib/_server.cpython-311.so
fl=_server.c
fn=process
+3 10
fi=inlined.h
* 5
cob=/lib/libc.so.6
cfn=memcpy
calls=2 0
+1 70

ob=/lib/libc.so.6
fn=memcpy
0 70
totals: 85

desc: Trigger: Client Request: twice
ob=/lib/libc.so.6
fn=memcpy
-4 140

desc: Trigger: Program termination
ob=/lib/libc.so.6
fn=exit
12 9999
"""


def test_calls_are_counted_where_they_lead_to() -> None:
    once, twice = parts(FILE)
    assert once == ("once", {"_server": 15, "libc": 70})
    assert twice == ("twice", {"libc": 140})


def test_a_file_without_parts_has_none() -> None:
    assert parts("version: 1\nfn=main\n0 7\n") == []
