"""LoRA as it is bound on a GPU, run here by its plain forms: peft's numbers, gradients and state dict."""

from __future__ import annotations

import pytest
import torch
from test_methods import adapted

from regraft.engine.methods.speed_gpu import bind_lora
from regraft.engine.packing import pack


def batch():
    generator = torch.Generator().manual_seed(4)
    return pack([torch.randint(5, 60, (n,), generator=generator).numpy() for n in (3, 17, 1, 9)])


def gradients(running) -> dict[str, torch.Tensor]:
    running.zero_grad(set_to_none=True)
    running(batch()).square().sum().backward()
    return {n: p.grad for n, p in running.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "lora",
    [{}, {"targets": ["query", "value"]}, {"rslora": True, "rank_pattern": {".*query": 3}}],
    ids=["all", "two of three", "ranks"],
)
def test_logits_gradients_and_state_dict_are_those_of_peft(tiny_model, lora):
    found = []
    for bound in (False, True):
        _, running = adapted(tiny_model, "lora", lora=lora)
        running.run_packed()
        if bound:
            counts = bind_lora(running)
            assert counts["merged attention"] == 2 and counts["LoRA"] >= 4
        running.eval()
        with torch.no_grad():
            logits = running(batch())
        found.append((logits, gradients(running), running.model.state_dict()))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5, rtol=1e-4)
    assert found[0][1].keys() == found[1][1].keys() and found[0][1]
    for name, wanted in found[0][1].items():
        assert torch.allclose(found[1][1][name], wanted, atol=1e-4 * float(wanted.abs().max()) + 1e-7), name
    assert found[0][2].keys() == found[1][2].keys()
    assert all(torch.equal(found[0][2][name], found[1][2][name]) for name in found[0][2])


def test_weights_in_four_bits_are_dequantised_by_our_kernel_and_give_the_same_numbers(tiny_model):
    pytest.importorskip("bitsandbytes")
    found = []
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles itself for odd shapes, which takes long
        for bound in (False, True):
            _, running = adapted(tiny_model, "qlora")
            running.run_packed()
            if bound:
                assert bind_lora(running)["LoRA"] >= 12
            running.eval()
            with torch.no_grad():
                logits = running(batch())
            found.append((logits, gradients(running)))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4, rtol=1e-3)
    for name, wanted in found[0][1].items():
        assert torch.allclose(found[1][1][name], wanted, atol=1e-3 * float(wanted.abs().max()) + 1e-7), name


def test_what_is_no_plain_lora_is_left_to_peft(tiny_model):
    _, running = adapted(tiny_model, "lora", lora={"dora": True})
    running.run_packed()
    assert bind_lora(running) == {"merged attention": 0, "LoRA": 0}
    assert not any("forward" in vars(m) for m in running.model.modules())


def test_its_dropout_is_drawn_in_training_alone_and_a_switched_off_adapter_is_off(tiny_model):
    _, running = adapted(tiny_model, "lora", lora={"dropout": 0.5})
    running.run_packed()
    assert bind_lora(running)["LoRA"] >= 12
    running.eval()
    with torch.no_grad():
        quiet = running(batch())
        assert torch.equal(quiet, running(batch()))
        for module in running.model.modules():  # dropout of the adapters alone
            if hasattr(module, "lora_A"):
                module.train()
        torch.manual_seed(0)
        first = running(batch())
        other = running(batch())
        torch.manual_seed(0)
        assert torch.equal(running(batch()), first) and not torch.equal(first, other)
        for module in running.model.modules():
            if hasattr(module, "lora_A"):
                module.enable_adapters(False)
        plain = running(batch())
    assert not torch.allclose(plain, quiet, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_over_weights_in_four_bits_learns_on_a_gpu(make_config, tmp_path):
    pytest.importorskip("bitsandbytes")
    from regraft.engine.config import load_config
    from regraft.engine.training.run import train

    path = make_config(method="qlora", training={"learning_rate": 1e-2, "precision": "auto", "epochs": 8})
    done = train(load_config(path), quiet=True)
    assert done.metrics["dev"]["accuracy"] > 0.6
    assert (tmp_path / "run" / "best" / "adapter_model.safetensors").stat().st_size < 60_000
