# The paper's Figure 4 as a dependency graph. `make` trains every stage that is missing, `make test` tests.
PYTHON ?= python3
BIN = .venv/bin

STAGES = pretrain sft rm rlhf gatt

all: out/gatt/consolidated.00.pth
	@for stage in $(STAGES); do printf '\n== %s\n' $$stage; cat out/$$stage/summary.txt; done
	@echo; for stage in $(STAGES); do printf '%-10s' $$stage; tail -n 1 out/$$stage/summary.txt; done

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# a stage that is finished is not run again; one that was interrupted goes on from its last save
out/pretrain/consolidated.00.pth: | .venv/ready
	$(BIN)/python train_pretrain.py --resume

out/sft/consolidated.00.pth: | out/pretrain/consolidated.00.pth
	$(BIN)/python train_sft.py --resume

out/rm/summary.txt: | out/sft/consolidated.00.pth
	$(BIN)/python train_rm.py --resume

out/rlhf/summary.txt: | out/rm/summary.txt
	$(BIN)/python train_rlhf.py --resume

# Ghost Attention comes after V3, as in the paper; V4 and V5 go on from V3 itself
out/gatt/consolidated.00.pth: | out/rlhf/summary.txt
	$(BIN)/python train_sft.py --ghost-attention --resume

# §4.2.3, after all that; a minute
out/distill/consolidated.00.pth: | out/gatt/consolidated.00.pth
	$(BIN)/python train_sft.py --distill --resume

distill: out/distill/consolidated.00.pth
	@cat out/distill/summary.txt

test: .venv/ready
	$(BIN)/python -m pytest -q test_llama2.py

# §2.1: what up-sampling facts brings, and costs, at equal tokens; three seeds, eleven minutes
upsampling: .venv/ready
	$(BIN)/python bench/upsampling.py

# §3.1: base against SFT, masked loss, quality against quantity; three seeds, eight minutes more
quality: .venv/ready
	$(BIN)/python bench/sft.py

# §3.2.2: reward models, margins, safety loss, amount of data; three seeds, eighteen minutes more
preferences: .venv/ready
	$(BIN)/python bench/rm.py

# §3.2.3, §3.4: whole runs, after preferences, 12 minutes; then PPO without its penalty, 3 minutes a
# seed, and the last version's samples alone, 4 minutes. Fig. 7 and 8, after all
rlhf-seeds rlhf-curves rlhf-hacking rlhf-forgetting: rlhf-%: .venv/ready
	$(BIN)/python bench/rlhf.py $*

# §3.3: Ghost Attention on more dialogues, three seeds, after rlhf-seeds; Fig. 9, after all
ghost-seeds ghost-attention: ghost-%: .venv/ready
	$(BIN)/python bench/ghost.py $*

# §4.2, §4.3: distillation after ghost-seeds, safety data scaling after upsampling, a round of red
# teaming after rlhf-seeds; three seeds each
safety-distillation safety-scaling safety-red-team: safety-%: .venv/ready
	$(BIN)/python bench/safety.py $*

clean:
	rm -rf out

.PHONY: all test distill upsampling quality preferences rlhf-seeds rlhf-curves rlhf-hacking \
	rlhf-forgetting ghost-seeds ghost-attention safety-distillation safety-scaling safety-red-team clean
