"""Messages that the fake server answers with."""

from hueshift.v1 import adapters_pb2, finetune_pb2, generation_pb2, model_pb2


def model_message() -> model_pb2.Model:
    """Return a model."""
    return model_pb2.Model(
        name="models/emoji-128",
        base_hash="ab" * 32,
        engine="onnxruntime",
        plans=["dense", "factored"],
        # 99 stands for a sampler that a newer server has.
        samplers=[generation_pb2.SAMPLER_DDIM, 99],  # type: ignore[list-item]
        default_sampler=generation_pb2.SAMPLER_DDIM,
        default_steps=20,
        default_guidance_scale=5.0,
        width=128,
        height=128,
        methods=[
            model_pb2.MethodInfo(
                method=finetune_pb2.FINE_TUNE_METHOD_SVDIFF,
                subject_defaults=finetune_pb2.FineTuneSettings(steps=150, learning_rate=0.5),
            )
        ],
        capacity=model_pb2.EngineCapacity(
            max_rows=16,
            adapter_slots=63,
            merged_slots=2,
            buckets=[8, 16],
            sizes=[model_pb2.SizeCapacity(width=768, height=512, rows=12)],
        ),
    )


def combined_message(request: adapters_pb2.CombineAdaptersRequest) -> adapters_pb2.CombineAdaptersResponse:
    """Return a stored combination, with a note."""
    adapter = adapters_pb2.Adapter(
        name=f"tenants/local/adapters/{request.adapter_id or 'made-up'}",
        kind=adapters_pb2.ADAPTER_KIND_KV,
        revision=1,
        method="combine",
        labels=request.labels,
    )
    return adapters_pb2.CombineAdaptersResponse(adapter=adapter, notes=["its rank is not served"])
