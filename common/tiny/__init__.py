"""The tiny world: small but really trained Stable Diffusion, CLIP, T5 and captioner, so that scripts run anywhere.

All models learn from one procedural "web" of digit pictures with captions, drawn from the fonts that matplotlib ships.
The real digits of scikit-learn, which the scripts adapt to, are never used here except to measure at the end.

    fonts --> [1] tokenizer --> [2] vae  --> [4] unet --> sd/            text-to-image, StableDiffusionPipeline layout
                                [3] clip ----^            clip/ clip_hf/ image and text towers, two file formats
                                [5] k2t                   k2t/           T5, keywords to captions
                                [6] captioner             captioner/     GIT on CLIP's image tower
                                [7] measure               README.md      quality figures, measured on the files written

glyphs.py draws and captions, training.py holds the loop, each model has its file, build.py runs them in order.

Run:
    python -m common.tiny                        # writes common/tiny_weights; the same command continues after a kill
    python -m common.tiny --device cuda
    python -m common.tiny --budget-scale 0.02 --out /tmp/world --work-dir /tmp/world-work    # a short rehearsal

Expect:
    the stages of the shipped build took 79 minutes with other programs on the same 2 cores; its time on an idle
    machine was not measured. Figures reached and missed: common/tiny_weights/README.md
"""

from pathlib import Path

# Nothing heavy is imported here: who wants only the folder imports only this file.
WEIGHTS = Path(__file__).resolve().parents[1] / "tiny_weights"
