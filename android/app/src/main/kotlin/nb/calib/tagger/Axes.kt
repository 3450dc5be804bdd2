package nb.calib.tagger

/** Scales of a chart from 0: where a value lies (0 to 1), and at most five round ticks. */
class Axes(at: DoubleArray, ms: DoubleArray) {
    private val width = maxOf(at.maxOrNull() ?: 0.0, 1e-9)
    private val step = round((ms.maxOrNull() ?: 1.0) * 1.05 / 4)
    private val height = step * Math.ceil((ms.maxOrNull() ?: 1.0) * 1.02 / step)
    val ticks: List<Double> = List(Math.round(height / step).toInt() + 1) { it * step }
    val topLabel = label(height)

    fun x(value: Double) = value / width

    fun y(value: Double) = value / height

    fun label(value: Double): String =
        if (value == Math.rint(value)) value.toLong().toString() else Numbers.short(value)

    /** 1, 2 or 5 times a power of ten, at least [raw]. */
    private fun round(raw: Double): Double {
        val power = Math.pow(10.0, Math.floor(Math.log10(maxOf(raw, 1e-6))))
        return listOf(1.0, 2.0, 5.0, 10.0).map { it * power }.first { it >= raw * 0.999 }
    }
}
