"""The registry of GPU memory, with libmla's part played by the test: it needs no GPU to see what is registered when."""
import ctypes
import gc
import os
import unittest
from unittest import mock

import mlad
from mlad import _libmla, arrays
from mlad.memory import Memory


class Device:
    """Pretended GPU memory: addresses that nobody reads."""

    def __init__(self, pointer, count, strides=None, read_only=False):
        self.__cuda_array_interface__ = {"shape": (count,), "typestr": "<f4", "data": (pointer, read_only),
                                         "strides": strides, "version": 3, "stream": None}


class Registry(unittest.TestCase):
    def setUp(self):
        self.calls, self.busy, self.dropped = [], set(), []
        self.memory = Memory(None, self.dropped.append)
        patch = mock.patch.object(_libmla, "call", self.call)
        patch.start()
        self.addCleanup(patch.stop)

    def call(self, name, *arguments):
        if name in ("mla_buffer_import_device", "mla_buffer_import"):
            *_, size, access, buffer = arguments
            pointer = arguments[1] if name == "mla_buffer_import_device" else 0
            ctypes.cast(buffer, ctypes.POINTER(ctypes.c_void_p))[0] = pointer + access + 1
            self.calls.append(("import", pointer, size, access))
        if name == "mla_buffer_free":
            if arguments[0] in self.busy:
                raise mlad.Error("in_use", "buffer", "a decode names it")
            self.calls.append(("free", arguments[0]))

    def find(self, device, access="read"):
        return self.memory.find(device, arrays.view(device, "x"), "x", access)

    def register(self, device, access=None):
        self.memory.register(device, arrays.view(device, "x"), "x", access)

    def refused(self, field, call, *arguments):
        with self.assertRaises(mlad.InvalidArgument) as caught:
            call(*arguments)
        self.assertEqual(caught.exception.field, field)

    def test_once_for_each_array_and_its_inside(self):
        whole, inside, beyond = Device(4096, 100), Device(4096 + 40, 90), Device(4096 + 40, 91)
        segment, offset = self.find(whole)
        self.assertEqual((segment.buffer, offset), (4098, 0))
        self.assertEqual(self.find(inside), (segment, 40))
        self.assertEqual(self.calls, [("import", 4096, 400, _libmla.READ)])
        self.find(beyond)
        self.assertEqual(self.calls[1:], [("import", 4136, 364, _libmla.READ)])

    def test_for_reading_until_it_is_written(self):
        device = Device(4096, 100)
        segment, _ = self.find(device)
        self.busy.add(4098)
        self.assertEqual(self.find(device, "readwrite")[0], segment)
        self.assertEqual(self.calls, [("import", 4096, 400, _libmla.READ), ("import", 4096, 400, _libmla.READWRITE)])
        self.assertEqual((segment.buffer, self.dropped), (4097, [segment]))     # its plans named the other buffer
        self.find(device)
        self.busy.clear()
        self.memory.sweep()
        self.assertEqual(self.calls[2:], [("free", 4098)])

    def test_more_of_memory_that_is_written(self):
        part, whole = Device(4096, 50), Device(4096, 100)
        self.find(part, "readwrite")
        self.find(whole)
        self.assertEqual(self.calls, [("import", 4096, 200, _libmla.READWRITE),
                                      ("import", 4096, 400, _libmla.READWRITE),
                                      ("free", 4097)])

    def test_the_callers_word(self):
        device, other = Device(4096, 100), Device(8192, 100)
        self.register(device, "read")
        self.register(device)
        self.find(device)
        self.refused("x", self.find, device, "readwrite")
        self.register(device, "readwrite")
        self.find(device, "readwrite")
        self.register(device, "read")
        self.refused("x", self.find, device, "readwrite")
        self.refused("access", self.register, other, "write")
        self.assertEqual([call[3] for call in self.calls if call[0] == "import"],
                         [_libmla.READ, _libmla.READWRITE, _libmla.READ])

    def test_host_memory_too(self):
        lease = self.memory.lease(100)
        array = lease.array("numpy", "f32", (10,))
        self.assertEqual(self.calls, [])
        self.find(array)
        self.find(array, "readwrite")
        self.assertEqual([call[-1] for call in self.calls], [_libmla.READ, _libmla.READWRITE, 2])
        descriptor = lease.segment.memfd
        os.fstat(descriptor)
        self.dropped.clear()
        del lease, array, self.memory
        gc.collect()
        with self.assertRaises(OSError):
            os.fstat(descriptor)

    def test_ends_when_the_array_dies_and_no_decode_names_it(self):
        device = Device(4096, 100)
        segment, _ = self.find(device)
        self.busy.add(4098)
        del device
        gc.collect()
        self.memory.sweep()
        self.assertEqual((self.dropped, self.calls), ([segment], [("import", 4096, 400, _libmla.READ)]))
        self.assertIsNone(self.memory.locate(arrays.view(Device(4096, 100), "x")))
        self.busy.clear()
        self.memory.sweep()
        self.assertEqual(self.calls[1:], [("free", 4098)])

    def test_another_array_at_the_same_address_is_registered_anew(self):
        device = Device(4096, 100)
        self.find(device, "readwrite")
        del device
        gc.collect()
        self.memory.sweep()
        again = Device(4096, 50)
        self.find(again)
        self.assertEqual([(call[0], call[-1]) for call in self.calls],
                         [("import", _libmla.READWRITE), ("free", 4097), ("import", _libmla.READ)])

    def test_what_cannot_be_shared(self):
        self.refused("x", self.find, Device(4096, 100, strides=(-4,)))


if __name__ == "__main__":
    unittest.main()
