"""The Triton backend's kernels without a GPU: how many programs share a pair, and what both chips are given."""

import re
import subprocess

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from seppo_fast.ops import triton_kernel  # noqa: E402


@pytest.mark.parametrize("elements", [1, 7, 128, 129, 16384, 16385, 65536, 262144, 2**22, 2**22 + 1, 2**31, 2**33 + 5])
@pytest.mark.parametrize("size", [2, 4])
def test_the_plan_covers_every_element(elements, size):
    parts, how = triton_kernel.plan(elements, size)
    block, warps, held = how["BLOCK"], how["num_warps"], how["BLOCK"] * how["CHUNKS"]
    assert block & (block - 1) == 0 and block % how["WIDTH"] == 0 and 1 <= warps <= 32
    assert (parts - 1) * held < elements <= parts * held and how["WHOLE"] == (elements == parts * held)
    if parts == 1:
        assert elements > held - block
    else:
        assert elements > triton_kernel.ONE_PROGRAM and held == triton_kernel.PART and warps == triton_kernel.PART_WARPS


def compiled(kernel, chip, policy, other, elements, shared=False, options=(), signed=False, **constants):
    """PTX, cubin and so on of the kernel for samples of so many elements, dense and aligned."""
    names = kernel.arg_names
    _, how = triton_kernel.plan(elements, 4 if policy == "fp32" else 2)
    usual = dict(FLIPPER=0, SFT=False, SCORED=False, SHARED=shared, WANTS_GRAD=True) | ({} if signed else {"signs": None})
    constants = {name: value for name, value in (how | usual | constants).items() if name in names}
    if elements == 1:
        constants["elements"] = 1  # as the launcher does with this number
    types = dict.fromkeys(("signs", "loss", "stats", "partial"), "*fp32") | {"counters": "*i32"}
    types |= {"policy": "*" + policy, "grad": "*" + policy, "target": "*" + other}
    types["reference"] = "*fp32" if constants.get("SCORED") else "*" + other
    numbers = ("steepness", "strength", "sft_weight", "sft_strength", "inverse", "weight")
    types |= dict.fromkeys(numbers, "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if signature[name][0] == "*" or name == "elements" and elements % 16 == 0}
    source = ASTSource(kernel, signature, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=aligned)
    options = {"num_warps": how["num_warps"]} | triton_kernel.EXACT | dict(options)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options).asm


def resources(asm, folder):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert len(found) == 1, "one kernel"
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found[0]), strict=True))


def assert_traffic(asm, policy, other, elements, rows=2, inputs=3, signed=False):
    """`elements` of winner and loser: each of the inputs read once, the gradient written once, 16 bytes at a time.

    What else goes to and from memory is a number a thread, and the ticket; of two inputs, the reference's errors besides; and the
    caller's sign.
    """
    per_thread = rows * elements // (32 * asm_warps(asm))
    bytes_of = {"fp32": 4, "bf16": 2, "fp16": 2}
    loads = re.findall(r"ld\.global\.v\S*", asm["ptx"])
    assert loads == ["ld.global.v4.b32"] * (per_thread * (bytes_of[policy] + (inputs - 1) * bytes_of[other]) // 16), loads
    others = set(re.findall(r"ld\.global\S*", asm["ptx"])) - set(loads)
    errors = {"ld.global.b32"} if inputs == 2 or signed else set()
    assert errors <= others <= {"ld.global.cg.b32", "ld.global.gpu.acquire.b32"} | errors, others
    stores = re.findall(r"st\.global\S*", asm["ptx"])
    assert stores.count("st.global.v4.b32") == per_thread * bytes_of[policy] // 16, stores
    assert set(stores) == {"st.global.v4.b32", "st.global.b32"}, stores
    assert not re.search(r"cp\.async|ld\.volatile|\.local\.", asm["ptx"])


@pytest.mark.parametrize("shared,inputs", [(False, 3), (True, 3), (True, 2)])
@pytest.mark.parametrize("policy,other", [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp16", "fp32"), ("bf16", "fp32")])
@pytest.mark.parametrize("chip", [80, 90])
def test_compiled_for_sd15(chip, policy, other, shared, inputs, tmp_path):
    """One kernel; each input read once, 16 bytes at a time; no spills; one ticket."""
    asm = compiled(triton_kernel.pair_kernel, chip, policy, other, 16384, shared, SCORED=inputs == 2)
    used = resources(asm, tmp_path)
    assert used["stack"] == used["local"] == 0 and used["registers"] * 32 * asm_warps(asm) <= 65536, used
    assert_traffic(asm, policy, other, 16384, inputs=inputs)
    assert re.findall(r"atom\.\S*", asm["ptx"]) == ["atom.global.gpu.acq_rel.add.u32"]
    # The thread that stores the results takes the ticket.
    assert len(set(re.findall(r"@(%p\d+) (?:st\.global\.b32|atom)", asm["ptx"]))) == 1


@pytest.mark.parametrize("policy,other", [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32")])
@pytest.mark.parametrize("inputs", [3, 2])
@pytest.mark.parametrize("chip", [80, 90])
def test_compiled_for_video(chip, policy, other, inputs, tmp_path):
    """The same of a part, for 4 x 16 x 32 x 32; as many fit a multiprocessor as the launch counts on."""
    registers = 65536 // (triton_kernel.RESIDENT * 32 * triton_kernel.PART_WARPS)
    asm = compiled(triton_kernel.parts_kernel, chip, policy, other, 65536, options={"maxnreg": registers},
                   PHASE=triton_kernel.TOGETHER.value, SCORED=inputs == 2)
    used = resources(asm, tmp_path)
    assert used["stack"] == used["local"] == 0 and used["registers"] <= registers and used["shared"] < 8192, used
    assert_traffic(asm, policy, other, triton_kernel.PART, inputs=inputs)
    assert re.findall(r"atom\.\S*", asm["ptx"]) == ["atom.global.gpu.acq_rel.add.u32"] * 2, "arrival and ticket"
    # One thread stores the sums, arrives and looks again for the others, and all wait for it.
    sums = 6 if inputs == 3 else 2
    arrival = re.search(rf"((?:@%p\d+ st\.global\.b32.*?){{{sums}}})bar\.sync.*?@(%p\d+) atom\.global\.gpu\.acq_rel.*?bar\.sync.*?"
                        r"@(%p\d+) ld\.global\.gpu\.acquire\.b32.*?bar\.sync.*?bar\.sync.*?ld\.global\.cg", asm["ptx"], re.DOTALL)
    assert set(re.findall(r"@(%p\d+) st", arrival[1])) == {arrival[2]} == {arrival[3]}


@pytest.mark.parametrize("chip", [80, 90])
def test_compiled_in_turn(chip, tmp_path):
    sums = compiled(triton_kernel.parts_kernel, chip, "bf16", "bf16", 65536, PHASE=triton_kernel.SUMS.value)
    gradient = compiled(triton_kernel.parts_kernel, chip, "bf16", "bf16", 65536, PHASE=triton_kernel.GRADIENT.value)
    assert re.findall(r"ld\.global\S*", sums["ptx"]) == ["ld.global.v4.b32"] * 12
    assert re.findall(r"st\.global\.v\S*", gradient["ptx"]) == ["st.global.v4.b32"] * 4
    from_errors = [compiled(kernel, chip, "bf16", "bf16", 65536, PHASE=triton_kernel.SUMS.value, SCORED=True)
                   for kernel in (triton_kernel.parts_kernel, triton_kernel.results_kernel)]
    assert re.findall(r"ld\.global\S*", from_errors[0]["ptx"]) == ["ld.global.v4.b32"] * 8
    for asm in (sums, gradient, compiled(triton_kernel.results_kernel, chip, "bf16", "bf16", 65536), *from_errors):
        used = resources(asm, tmp_path)
        assert used["stack"] == used["local"] == 0, used
    for elements in (1, 9, 17 * 29, 70_001):  # the launcher makes a constant of 1
        kernel = triton_kernel.pair_kernel if elements <= 16384 else triton_kernel.parts_kernel
        compiled(kernel, chip, "fp32", "bf16", elements, PHASE=triton_kernel.TOGETHER.value)
        compiled(kernel, chip, "fp32", "bf16", elements, PHASE=triton_kernel.TOGETHER.value, SCORED=True)


@pytest.mark.parametrize(("inputs", "signed"), [(3, False), (2, False), (3, True)])
@pytest.mark.parametrize("policy", ["fp32", "bf16"])
@pytest.mark.parametrize("chip", [80, 90])
def test_compiled_with_an_sft_weight(chip, policy, inputs, signed, tmp_path):
    """No more traffic and no spills: the winner's error is there already. Nor with a sign a pair."""
    together = {"PHASE": triton_kernel.TOGETHER.value, "SCORED": inputs == 2, "SFT": True}
    registers = 65536 // (triton_kernel.RESIDENT * 32 * triton_kernel.PART_WARPS)
    for kernel, elements, each, options in ((triton_kernel.pair_kernel, 16384, 16384, {}),
                                            (triton_kernel.parts_kernel, 65536, triton_kernel.PART, {"maxnreg": registers})):
        asm = compiled(kernel, chip, policy, policy, elements, options=options, signed=signed, **together)
        used = resources(asm, tmp_path)
        assert used["stack"] == used["local"] == 0 and used["registers"] * 32 * asm_warps(asm) <= 65536, used
        assert_traffic(asm, policy, policy, each, inputs=inputs, signed=signed)
    compiled(triton_kernel.results_kernel, chip, policy, policy, 65536, signed=signed, **together)


def summed_layouts(asm):
    """How the operands of each reduction lie in the threads: what, besides the code, decides the order of the sum."""
    named = dict(re.findall(r"^(#\w+) = (.*)$", asm["ttgir"], re.MULTILINE))
    operands = re.findall(r'"tt\.reduce"\(.*?\}\) : \((.*?)\) ->', asm["ttgir"], re.DOTALL)
    return [re.sub(r"#\w+", lambda name: named.get(name[0], name[0]), types) for types in operands]


@pytest.mark.parametrize("policy,other", [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")])
@pytest.mark.parametrize("elements", [16384, 65536])
def test_compiled_sums_are_alike_with_and_without_a_gradient(policy, other, elements):
    """Else a policy that was scored would not tie in training."""
    kernel = triton_kernel.pair_kernel if elements == 16384 else triton_kernel.parts_kernel
    options = {"SCORED": True, "PHASE": triton_kernel.TOGETHER.value}
    training = summed_layouts(compiled(kernel, 90, policy, other, elements, **options))
    scoring = summed_layouts(compiled(kernel, 90, policy, other, elements, WANTS_GRAD=False, FLIPPER=2, **options))
    assert len(training) >= 4 and training == scoring and "blocked" in training[0]


def asm_warps(asm):
    return int(re.search(r"\.reqntid (\d+)", asm["ptx"]).group(1)) // 32
