package nb.calib.tagger

/** A tag and its probability. */
class Tag(val name: String, val probability: Float)

/** What one visit of a photo gave; times in milliseconds, [at] in seconds since the start. */
class PhotoResult(
    val name: String, val at: Double, val decodeMs: Double, val preprocessMs: Double, val runMs: Double,
    val scores: FloatArray,
) {
    val totalMs get() = decodeMs + preprocessMs + runMs

    /** Tags of at least [threshold], the likeliest first. */
    fun tags(classes: List<String>, threshold: Float): List<Tag> =
        scores.indices.map { Tag(classes[it], Numbers.sigmoid(scores[it])) }
            .filter { it.probability >= threshold }.sortedByDescending { it.probability }
}

object Numbers {
    fun sigmoid(x: Float): Float = (1 / (1 + Math.exp(-x.toDouble()))).toFloat()

    /** Three digits, without needless zeros: 12.5, 0.04. */
    fun short(value: Double): String =
        java.math.BigDecimal(value).round(java.math.MathContext(3)).stripTrailingZeros().toPlainString()

    /** Quantile with linear interpolation, as numpy.quantile computes it. */
    fun quantile(values: DoubleArray, q: Double): Double {
        if (values.isEmpty()) return Double.NaN
        val sorted = values.sortedArray()
        val at = q * (sorted.size - 1)
        val low = Math.floor(at).toInt()
        val high = minOf(low + 1, sorted.size - 1)
        return sorted[low] + (at - low) * (sorted[high] - sorted[low])
    }
}

/** Median and quartiles of a time in milliseconds. */
class Summary(values: DoubleArray) {
    val median = Numbers.quantile(values, 0.5)
    val low = Numbers.quantile(values, 0.25)
    val high = Numbers.quantile(values, 0.75)

    fun toMap(): Map<String, Any?> = linkedMapOf("median" to median, "q1" to low, "q3" to high)
}

/** Everything that a benchmark measured. */
class Report(
    val spec: TaggerSpec, val plan: Plan, val results: List<PhotoResult>, val unreadable: List<String>,
    val seconds: Double, val health: List<Pair<Double, Health>>,
) {
    val decode get() = summary { it.decodeMs }
    val preprocess get() = summary { it.preprocessMs }
    val run get() = summary { it.runMs }
    val total get() = summary { it.totalMs }

    private fun summary(time: (PhotoResult) -> Double) = Summary(DoubleArray(results.size) { time(results[it]) })

    /** Each photo once, as it was seen first. */
    val photos: List<PhotoResult> get() = results.distinctBy { it.name }

    /** Median run time of the last fifth by that of the first: above 1 the phone has become slower. */
    val throttling: Double
        get() {
            val fifth = maxOf(1, results.size / 5)
            fun median(part: List<PhotoResult>) = Numbers.quantile(DoubleArray(part.size) { part[it].runMs }, 0.5)
            return median(results.takeLast(fifth)) / median(results.take(fifth))
        }

    /** Content of result.json; [about] is what only the app knows: program, device, backend. */
    fun toMap(about: Map<String, Any?>): Map<String, Any?> = linkedMapOf<String, Any?>("format" to 1) + about + linkedMapOf(
        "labels" to spec.classes,
        "plan" to linkedMapOf(
            "warmup" to plan.warmup, "runs" to plan.runs, "seconds" to plan.seconds, "threshold" to plan.threshold,
        ),
        "seconds" to seconds,
        "visits" to results.size,
        "ms" to linkedMapOf(
            "decode" to decode.toMap(), "preprocess" to preprocess.toMap(), "run" to run.toMap(), "total" to total.toMap(),
        ),
        "throttling" to throttling,
        "health" to health.map { (at, health) -> linkedMapOf<String, Any?>("at" to at) + health.toMap() },
        "series" to linkedMapOf("at" to results.map { it.at }, "run_ms" to results.map { it.runMs }),
        "unreadable" to unreadable,
        "photos" to photos.map { photo ->
            linkedMapOf(
                "name" to photo.name, "decode_ms" to photo.decodeMs, "preprocess_ms" to photo.preprocessMs,
                "run_ms" to photo.runMs, "scores" to photo.scores.toList(),
                "tags" to photo.tags(spec.classes, plan.threshold).map { it.name },
            )
        },
    )
}
