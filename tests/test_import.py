import subprocess
import sys


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_paceline_brings_neither_torch_nor_numpy():
    loaded = run("import sys, paceline; print(*sys.modules)")
    assert "paceline" in loaded
    assert not {"torch", "transformers", "numpy"} & set(loaded)


def test_generating_needs_no_torch():
    loaded = run(
        "import sys, paceline\n"
        "paceline.LM().generate('Once', max_new_tokens=3)\n"
        "print(*sys.modules)"
    )
    assert "torch" not in loaded
